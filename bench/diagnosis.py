"""What diagnosis costs: training time with it to training time without, and the cost of a sampled step.

    python bench/diagnosis.py [--rounds 5] [--steps 215] [--whole-epoch] [--experiments mnist_fast lab]

A line each for the recorder alone and for all that a training has: stopwatch, recorder and the rules that are
asked after the epoch. (System metrics are sampled by another process.) Fits with and without them alternate in one
process; a ratio is taken within a round. Time is the processor's (other load on the machine disturbs it less) and
the wall clock's. The prediction is steadier: a fit in which every second step is sampled gives the extra time of
one (the processor's, without a GPU), and the schedule says how many there are.
"""

from __future__ import annotations

from cnn_tuning.machine import prepare_process

prepare_process()

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from torch.profiler import ProfilerActivity, profile
from workplace import machine, prepared

from cnn_tuning.config import Recipe, compose, patch, select
from cnn_tuning.data.packed import PackedData
from cnn_tuning.diagnosis.recorder import Recorder, next_sample
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.training.fit import fit

Make = Callable[[], list[Callback]]
# The same images: prepared once.
DATA_OF = {"lab": "mnist_fast"}
ACTIVITIES = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
PROFILED = (40, 41)
LENGTHS = (50, 215, 500, 1_719, 17_190, 100_000)


class Times:
    """Two callbacks around those that are measured: `first` and `last` of the list see their work from both sides.

    `total`: (wall, processor) seconds of learning and of what they do after it. `steps`: seconds of each
    step, the processor's without a GPU. `operations`: of the two profiled steps, on the GPU where there is one.
    """

    def __init__(self, stop_at: int, *, count: bool = False) -> None:
        self.stop_at, self.count = stop_at, count
        self.total = [0.0, 0.0]
        self.steps: list[float] = []
        self.operations: dict[int, int] = {}
        self.first, self.last = _First(self), _Last(self)
        self.began = (0.0, 0.0)
        self.profile: Any = None

    def begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.began = (time.perf_counter(), time.process_time())

    def end(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        self.total = [self.total[0] + wall, self.total[1] + processor]
        return wall if torch.cuda.is_available() else processor


class _First(Callback):
    def __init__(self, times: Times) -> None:
        self.times = times

    def on_train_batch_start(self, trainer, *_):
        if self.times.count:
            if trainer.global_step + 1 in PROFILED:
                self.times.profile = profile(activities=ACTIVITIES)
                self.times.profile.start()
            self.times.begin()
        elif trainer.global_step == 0:
            self.times.begin()

    def on_validation_start(self, *_):
        if not self.times.count:
            self.times.end()

    def on_validation_end(self, *_):
        self.times.begin()

    def on_train_epoch_end(self, *_):
        self.times.begin()


class _Last(Callback):
    def __init__(self, times: Times) -> None:
        self.times = times

    def on_train_batch_end(self, trainer, *_):
        if self.times.count:
            self.times.steps.append(self.times.end())
            if trainer.global_step in PROFILED:
                self.times.profile.stop()
                self.times.operations[trainer.global_step] = _operations(self.times.profile)
        if trainer.global_step == self.times.stop_at:
            trainer.should_stop = True

    def on_validation_end(self, *_):
        self.times.end()

    def on_train_epoch_end(self, *_):
        self.times.end()


def main() -> None:
    """Measure, and print ratios and predictions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=215)
    parser.add_argument("--whole-epoch", action="store_true", help="as many steps as an epoch has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experiments", nargs="+", default=["mnist_fast", "lab"])
    options = parser.parse_args()
    print(machine())
    for experiment in options.experiments:
        _measure(experiment, options)


def _measure(experiment: str, options: argparse.Namespace) -> None:
    data = PackedData.open(prepared(DATA_OF.get(experiment, experiment)) / "data/prepared")
    config = compose([f"experiment={experiment}", f"trainer.threads={options.threads}"])
    recipe = patch(select(Recipe, config), {"trainer.max_epochs": 1, "trainer.train_eval_samples": 1000})
    epoch = -(-sum(data.meta.counts["train"]) // recipe.trainer.batch_size)
    steps = epoch if options.whole_epoch else options.steps
    measured: dict[str, Make] = {
        "the recorder": lambda: [Recorder()],
        "all of diagnosis": lambda: Watch(recipe, config.diagnosis, experiment).callbacks,
    }
    ratios = list(_ratios(recipe, data, options.rounds, steps, list(measured.values())))
    for what, own in zip(measured, zip(*ratios, strict=True), strict=True):
        for name, pair in zip(("processor", "wall"), zip(*own, strict=True), strict=True):
            print(
                f"{experiment}: {name} time with to without {what}, {steps} steps: median "
                f"{statistics.median(pair):.3f} ({min(pair):.3f} to {max(pair):.3f}; {options.rounds} rounds)"
            )
    print(f"{experiment}: the recorder: {_prediction(recipe, data, options.steps)}")


def _ratios(
    recipe: Recipe, data: PackedData, rounds: int, steps: int, measured: Sequence[Make]
) -> Iterator[list[tuple[float, float]]]:
    """Yield each round's ratios of processor and wall time, a pair for each of `measured`; places alternate."""
    for make in (list, *measured):
        _fit(recipe, data, Times(20), make())  # what is loaded and allocated once
    makes: list[Make] = [list, *measured]
    for turn in range(rounds):
        totals = {}
        for place in reversed(range(len(makes))) if turn % 2 else range(len(makes)):
            times = Times(steps)
            _fit(recipe, data, times, makes[place]())
            totals[place] = times.total
        wall, processor = totals[0]
        yield [(totals[i][1] / processor, totals[i][0] / wall) for i in range(1, len(makes))]


def _prediction(recipe: Recipe, data: PackedData, steps: int) -> str:
    """Return a line on a sampled step beside a plain one, and the ratio that follows for some lengths."""
    times = Times(steps, count=True)
    _fit(recipe, data, times, [Recorder(after=lambda step: step + 2 - step % 2)])
    pairs = list(zip(times.steps[11::2], times.steps[12::2], strict=False))  # sampled, and the plain one after it
    plain = statistics.median(plain for _, plain in pairs)
    extra = statistics.median(sampled - plain for sampled, plain in pairs)
    sampled, unsampled = (times.operations[step] for step in PROFILED)
    predicted = [f"{1 + _samples(length) / length * extra / plain:.3f} for {length:,}" for length in LENGTHS]
    return (
        f"a sampled step takes {extra * 1e3:.2f} ms more than a plain one ({plain * 1e3:.2f} ms), "
        f"{sampled} operations to {unsampled}; predicted ratio {', '.join(predicted)} steps"
    )


def _samples(steps: int) -> int:
    """Return how many of so many steps are sampled."""
    step = count = 0
    while (step := next_sample(step)) <= steps:
        count += 1
    return count


def _operations(profiled: Any) -> int:
    """Return how many kernels ran on the GPU, or without one how many operations on the CPU."""
    events = profiled.events()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels) or sum(event.name.startswith("aten::") for event in events)


def _fit(recipe: Recipe, data: PackedData, times: Times, recorder: list[Callback]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [times.first, *recorder, times.last]
        fit(recipe, data, state_folder=Path(folder), callbacks=callbacks, brief=True)


if __name__ == "__main__":
    main()
