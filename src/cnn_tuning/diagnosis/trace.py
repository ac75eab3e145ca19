"""A trace of some steps by torch's profiler, on demand: `trace.json.gz`, `operators.csv` and their rows come out.

The trace opens in https://ui.perfetto.dev and in Chrome's `chrome://tracing`; it slows the steps that it covers.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

TRACE, OPERATORS = "trace.json.gz", "operators.csv"
PHASES = ("forward", "backward", "optimiser")


@dataclass(frozen=True)
class Operator:
    """What all calls of an operator took in the traced steps; `self`: without the operators that it called.

    `share`: of all operators' self time, on the GPU where one takes part.
    """

    name: str
    calls: int
    self_cpu_s: float
    cpu_s: float
    self_gpu_s: float
    gpu_s: float
    share: float


class Tracer(pl.Callback):
    """Traces `active` steps after `wait` that it leaves alone and `warmup` that the profiler discards.

    In an epoch too short for that it waits and warms up less. `operators` is filled once the steps are done, the
    longest first; None until then.
    """

    def __init__(self, folder: Path, *, wait: int = 5, warmup: int = 3, active: int = 10) -> None:
        self.folder, self.wait, self.warmup, self.active = folder, wait, warmup, active
        self.operators: list[Operator] | None = None
        self.profile: profile | None = None
        self.left = 0
        self.phase: contextlib.AbstractContextManager[Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the profiler."""
        if self.operators is not None:
            return
        # The profiler's library tells on stderr when it starts and that there is no driver.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        steps = max(1, int(trainer.num_training_batches) - trainer.global_step % int(trainer.num_training_batches))
        active = min(self.active, steps)
        warmup = min(self.warmup, steps - active)
        wait = min(self.wait, steps - active - warmup)
        self.left = wait + warmup + active
        activities = [ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            acc_events=True,
        )
        self.profile.start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the part of the step in the trace."""
        self._enter("forward")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        """Name the part of the step in the trace."""
        self._enter("backward")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Name the part of the step in the trace."""
        self._enter("optimiser")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; after the last one write the trace."""
        if self.profile is None:
            return
        self._leave()
        self.profile.step()
        self.left -= 1
        if self.left == 0:
            done = self._stop()
            self.operators = _operators(done)
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_trace(done, self.folder / TRACE)
            write_operators(self.folder / OPERATORS, self.operators)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Stop a profiler that is still at work."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop a profiler that is still at work."""
        self._stop()

    def _enter(self, phase: str) -> None:
        if self.profile is not None:
            self._leave()
            self.phase = record_function(phase)
            self.phase.__enter__()

    def _leave(self) -> None:
        if self.phase is not None:
            self.phase.__exit__(None, None, None)
            self.phase = None

    def _stop(self) -> Any:
        self._leave()
        done, self.profile = self.profile, None
        if done is not None:
            done.stop()
        return done


def write_operators(path: Path, operators: list[Operator]) -> None:
    """Write operators as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Operator)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(operator) for operator in operators)


def _operators(done: profile) -> list[Operator]:
    averages: list[Any] = [
        entry
        for entry in done.key_averages()
        if not entry.is_user_annotation and not entry.key.startswith("ProfilerStep") and entry.key not in PHASES
    ]
    on_gpu = sum(entry.self_device_time_total for entry in averages)
    whole = on_gpu or sum(entry.self_cpu_time_total for entry in averages) or 1
    rows = [
        Operator(
            name=entry.key,
            calls=entry.count,
            self_cpu_s=entry.self_cpu_time_total / 1e6,
            cpu_s=entry.cpu_time_total / 1e6,
            self_gpu_s=entry.self_device_time_total / 1e6,
            gpu_s=entry.device_time_total / 1e6,
            share=(entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) / whole,
        )
        for entry in averages
    ]
    return sorted(rows, key=lambda row: row.share, reverse=True)


def _write_trace(done: profile, path: Path) -> None:
    plain = path.with_suffix("")
    done.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
