"""The stopwatch of a fit: a callback that says where the time went. `fit` goes in as hooks, `Times` come out.

Each step costs three readings of the clock and two additions. The parts inside a step are read at sampled
steps, which get rarer as a training grows: the first fifty, then one in a fiftieth of the steps made so far,
at random distances, so that nothing periodic falls in step with them. It draws from no shared generator.
"""

from __future__ import annotations

import contextlib
import functools
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from cnn_tuning.diagnosis.recording import STEP_PARTS, Floats, Times
from cnn_tuning.machine import usable_cores

DENSE_STEPS = 50
PHASES = ("initialisation", "training", "validation", "logging")
# Marks of a sampled step: asked for data, got it, and the hooks that Lightning calls until its end.
MARKS = 8


class Stopwatch(pl.Callback):
    """Times one fit, as far as this process makes it; the clock starts when it is made.

    First of the callbacks, it counts the others as `logging` and not as part of the step. A fit that starts anew
    (out of memory) is timed anew; what it lost counts as initialisation.
    """

    def __init__(self) -> None:
        self.began, self.began_at = time.perf_counter(), time.time()
        self._forget()

    def _forget(self) -> None:
        self.totals = dict.fromkeys(PHASES, 0.0)
        self.phase, self.since, self.ended = PHASES[0], self.began, 0.0
        self.steps, self.waits = array("f"), array("f")
        self.sampled: list[int] = []
        self.parts: list[tuple[float, ...]] = []
        self.marks: list[float] = []
        self.number = self.samples = 0
        self.next_sampled, self.first_step = 1, 1
        self.generator = np.random.default_rng(0)
        self.gpu: _Gpu | None = None
        self.facts: dict[str, Any] = {}

    def times(self, samples: Sequence[tuple[float, Mapping[str, float]]] = ()) -> Times:
        """Return what was timed so far.

        `samples`: (seconds since the epoch, metric name → value) of the system, from `Run.system_samples`.
        """
        now = self.ended or time.perf_counter()
        parts = np.array(self.parts, np.float32).reshape(len(self.parts), 1 + len(STEP_PARTS)).T
        unknown = {"device": "cpu", "precision": "", "resident": False, "loader_workers": 0}
        measured: dict[str, Any] = {
            **self.totals,
            self.phase: self.totals[self.phase] + now - self.since,
            **dict(zip(("data", *STEP_PARTS), parts, strict=True)),
            **_system(samples, self.began_at, now - self.began, self.gpu.device.index or 0 if self.gpu else 0),
            **(self.facts or unknown),
            **(self.gpu.memory if self.gpu else {}),
        }
        return Times(
            first_step=self.first_step,
            step=np.array(self.steps, np.float32),
            wait=np.array(self.waits[: len(self.steps)], np.float32),
            sampled=np.array(self.sampled, np.int64),
            total=now - self.began,
            samples=self.samples,
            cores=usable_cores(),
            threads=torch.get_num_threads(),
            **measured,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch the training batches of this fit."""
        self._forget()
        batches: Any = trainer.datamodule  # type: ignore[attr-defined]
        give, resident = batches.train_dataloader, batches.train.images is not None
        batches.train_dataloader = functools.wraps(give)(lambda: _Watched(give(), self))
        device = trainer.strategy.root_device
        self.gpu = _Gpu(device) if device.type == "cuda" else None
        self.facts = {
            "device": device.type,
            "precision": str(trainer.precision),
            "resident": resident,
            "loader_workers": 0 if resident else pl_module.recipe.trainer.workers,  # type: ignore[union-attr]
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where this process begins."""
        self.first_step = trainer.global_step + 1

    def begin_step(self) -> None:
        """Start a step: its batch is asked for."""
        self.number += 1
        self.marks = []
        sampled = self.number == self.next_sampled
        if self.gpu:
            self.gpu.begin(self.number, sampled)
        self._switch("training")
        if sampled:
            self.marks.append(self.since)

    def end_wait(self) -> None:
        """Take the time that the batch took to come."""
        if self.marks:
            self._mark()
            now = self.marks[-1]
        else:
            now = time.perf_counter()
        self.waits.append(now - self.since)

    def no_batch(self) -> None:
        """Take back a step whose batch did not come: the data are at their end."""
        self.number -= 1
        if self.gpu:
            self.gpu.take_back()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Mark the start of the forward pass."""
        if self.marks:
            self._mark()

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Mark the end of the forward pass."""
        if self.marks:
            self._mark()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        """Mark the start of the backward pass."""
        if self.marks:
            self._mark()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Mark its end."""
        if self.marks:
            self._mark()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Mark the start of the update."""
        if self.marks:
            self._mark()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step."""
        began = self.since
        if self.gpu:
            self.gpu.end(bool(self.marks))
        self._switch("logging")
        if self.gpu is None:
            self.steps.append(self.since - began)
        self.samples += trainer.datamodule.train.size_of(batch_idx)  # type: ignore[attr-defined]
        if self.marks:
            self._sample()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """End the training of an epoch; on a GPU what it has not done yet belongs to it."""
        if self.gpu:
            self._switch("training")
            self.steps.extend(self.gpu.read())
        self._switch("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """End a validation."""
        self._switch("logging")

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Stop the clock."""
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop the clock of a fit that fails."""
        self._end()

    def _end(self) -> None:
        if self.ended:
            return
        if self.gpu:
            with contextlib.suppress(RuntimeError):  # the fit failed on the GPU
                self.steps.extend(self.gpu.read())
        self._switch("logging")
        self.ended = self.since

    def _switch(self, phase: str) -> None:
        now = time.perf_counter()
        self.totals[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def _mark(self) -> None:
        if self.gpu:
            self.gpu.wait()
        self.marks.append(time.perf_counter())

    def _sample(self) -> None:
        marks, self.marks = [*self.marks, self.since], []
        if len(marks) == MARKS:
            asked, got, start, zero, backward, through, update, end = marks
            rest = start - got + update - through
            self.sampled.append(self.first_step - 1 + self.number)
            optimiser = backward - zero + end - update
            self.parts.append((got - asked, zero - start, through - backward, optimiser, rest))
        gap = max(1, self.number // DENSE_STEPS)
        self.next_sampled = self.number + 1 + int(self.generator.integers(2 * gap - 1))


class _Watched:
    """Training batches that tell the stopwatch when one is asked for and when it has come."""

    def __init__(self, batches: Any, stopwatch: Stopwatch) -> None:
        self.batches, self.stopwatch = batches, stopwatch

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Any]:
        taken = iter(self.batches)
        while True:
            self.stopwatch.begin_step()
            try:
                batch = next(taken)
            except StopIteration:
                self.stopwatch.no_batch()
                return
            self.stopwatch.end_wait()
            yield batch


class _Gpu:
    """Steps by the GPU's clock: events at both ends of each, read where the process waits for the GPU anyway."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: list[torch.cuda.Event] = []
        self.memory = {"gpu_memory_total": float(torch.cuda.get_device_properties(device).total_memory)}

    def begin(self, number: int, sampled: bool) -> None:
        if sampled:
            self.wait()
        if number == 3:  # by now the optimizer has its state
            self.memory["gpu_memory_base"] = float(torch.cuda.memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)  # that of an earlier fit, or of a validation
        self._record()

    def end(self, sampled: bool) -> None:
        self._record()
        if sampled:
            self.wait()

    def take_back(self) -> None:
        self.events.pop()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def read(self) -> list[float]:
        """Return the seconds of each step since the last reading."""
        self.wait()
        if "gpu_memory_base" in self.memory:  # of one epoch's steps: no batch of a validation is in it
            self.memory.setdefault("gpu_memory_peak", float(torch.cuda.max_memory_allocated(self.device)))
        pairs = zip(self.events[::2], self.events[1::2], strict=False)
        seconds = [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        self.events = []
        return seconds

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.events.append(event)


def _system(
    samples: Sequence[tuple[float, Mapping[str, float]]], began_at: float, total: float, device: int
) -> dict[str, Floats]:
    """Return the fields of `Times` that come from samples of the system; `device` is CUDA's number of the GPU."""
    since = [(at - began_at, values) for at, values in samples if 0 <= at - began_at <= total]
    used, cores = "_utilization_percentage", usable_cores()
    names = dict.fromkeys(name for _, values in since for name in values)
    # Named by the machine's numbers, sampled in CUDA's order: CUDA_VISIBLE_DEVICES=3,1 gives gpu_3, then gpu_1.
    gpus = [name.removesuffix(used) for name in names if "/gpu_" in name and name.endswith(used)]
    gpu = gpus[device] if device < len(gpus) else next(iter(gpus), "")

    def column(name: str, factor: float) -> Floats:
        return np.array([values.get(name, np.nan) * factor for _, values in since], np.float32)

    return {
        "system_at": np.array([at for at, _ in since], np.float32),
        "cpu": column("system/process_cpu_utilization_percentage", 1 / cores),
        "machine_cpu": column("system/cpu_utilization_percentage", 1.0),
        "memory": column("system/process_memory_usage_megabytes", 1e6),
        "disk_read": column("system/process_disk_read_megabytes_per_second", 1e6),
        "disk_write": column("system/process_disk_write_megabytes_per_second", 1e6),
        "gpu": column(f"{gpu}{used}", 1.0),
        "gpu_memory": column(f"{gpu}_memory_usage_megabytes", 1e6),
    }
