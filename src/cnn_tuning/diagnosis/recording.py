"""What a training leaves for its diagnosis: arrays, one `.npz` a part, without pickles.

All but `Times` follow from recipe, data and code, so that the same inputs give the same bytes. A value that
was not measured is NaN; a part that was not recorded is None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.errors import UserError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Part = TypeVar("Part")
STEP_PARTS = ("forward", "backward", "optimiser", "rest")


@dataclass(frozen=True)
class Curves:
    """Losses of all S steps and the measurements of all E epochs.

    `loss`, `learning_rate`: S, of the training batch of each step (1 is the first). `epoch_step`: E, the last
    step of each epoch. `train_*`, `val_*`: E, measured after it on the same footing. `planned_steps`: of the
    whole recipe. `not_finite`: layer and what of it was first not finite, empty where all was.
    `not_finite_step`: -1 where all was. `data_digest`: of the prepared data; empty in older recordings.
    """

    loss: Floats
    learning_rate: Floats
    epoch_step: Integers
    train_loss: Floats
    train_accuracy: Floats
    val_loss: Floats
    val_accuracy: Floats
    steps_per_epoch: int
    planned_steps: int
    not_finite: str = ""
    not_finite_step: int = -1
    data_digest: str = ""


@dataclass(frozen=True)
class Tensors:
    """Statistics of weights, gradients and activations at K sampled steps.

    `layers`: L modules with a weight of two or more dimensions (normalisation is none), from input to output; K×L
    arrays, of at most 65,536 weights of each: `weight_rms`, `weight_zero` (share of exact zeros), `gradient_rms`,
    `gradient_mean` (mean |g|), `gradient_zero`, all before clipping, `output_variance` (of what the layer puts
    out, for at most 64 images), `update_ratio` (‖Δw‖/‖w‖ of that step). `trainable`: L, 1 where the weight
    requires a gradient. `changed`: L, ‖w_last − w_first‖/‖w_first‖ from the start to the end of the last epoch.
    `activations`: A activation modules, of `kinds` (ReLU, Sigmoid, Tanh, …); K×A arrays: `active` (mean share of
    outputs above 0 for ReLU-like), `dead` (share of units, channels of a convolution, that were active in less
    than 1 % of the images and positions of the last 8 samples; NaN for all but ReLU and ReLU6), `saturated` (share
    of outputs within 1 % of a bound of their range; NaN where the function has none).
    """

    step: Integers
    layers: tuple[str, ...]
    weight_rms: Floats
    weight_zero: Floats
    gradient_rms: Floats
    gradient_mean: Floats
    gradient_zero: Floats
    output_variance: Floats
    update_ratio: Floats
    trainable: Integers
    changed: Floats
    activations: tuple[str, ...]
    kinds: tuple[str, ...]
    active: Floats
    dead: Floats
    saturated: Floats


@dataclass(frozen=True)
class Data:
    """What the data and the best network's answers to the validation split show.

    `classes`: C names. `counts`: C, of the training split. `input_mean`, `input_std`: per channel, of what the
    network's first layer gets, over sampled images. `labels`: V; `probabilities`: V×C, of the validation split.
    `shared`: M×2, positions (train, val) of each validation image that the training split has too. `repeated`:
    equal images within the training split beyond the first of each. `conflicting`: images of the training split
    of which it has an equal one with another label. `compared`: training images that these three were sought
    among; None: all.
    """

    classes: tuple[str, ...]
    counts: Integers
    input_mean: Floats
    input_std: Floats
    labels: Integers
    probabilities: Floats
    shared: Integers
    repeated: int
    conflicting: int
    compared: int | None = None


@dataclass(frozen=True)
class Sweep:
    """A learning-rate range test: the smoothed training loss while the rate grows from step to step."""

    learning_rate: Floats
    loss: Floats


@dataclass(frozen=True)
class Times:
    """Where the time of one process's part of a training went, in seconds; no two runs give the same.

    `first_step`: above 1 where the training went on from a checkpoint. Of each of S steps: `step`, from asking for
    its batch to the end of its update; `wait`, the part of it until the batch came. Of K steps `sampled` (1 is the
    first of the recipe), which add up to the step: `data`, `forward`, `backward`, `optimiser`, `rest`. On a GPU
    `step` is by its own clock, `wait` the process's, and a sampled step waits for the GPU after each part.
    Totals: `initialisation` (before the first step), `training`, `validation`, `logging` (other callbacks, records
    and checkpoints), `total` is their sum. `samples`: images learnt from.
    `system_at`: T, since the start; T samples each, NaN where there is none: `cpu` (percent of all usable cores,
    by the run's processes), `machine_cpu` (by all), `memory` (private bytes of the run's processes), `disk_read`,
    `disk_write` (bytes/s of the run's processes), `gpu` (percent), `gpu_memory` (bytes, of all that use it).
    `cores`: usable. `device`: cpu or cuda. `resident`: the images are on the device. `loader_workers`: processes
    that read data. Bytes, 0 without a GPU: `gpu_memory_total`; `gpu_memory_base` between two steps,
    `gpu_memory_peak` in them.
    """

    first_step: int
    step: Floats
    wait: Floats
    sampled: Integers
    data: Floats
    forward: Floats
    backward: Floats
    optimiser: Floats
    rest: Floats
    initialisation: float
    training: float
    validation: float
    logging: float
    total: float
    samples: int
    system_at: Floats
    cpu: Floats
    machine_cpu: Floats
    memory: Floats
    disk_read: Floats
    disk_write: Floats
    gpu: Floats
    gpu_memory: Floats
    cores: int
    threads: int
    device: str
    precision: str
    resident: bool
    loader_workers: int
    gpu_memory_total: float = 0.0
    gpu_memory_base: float = 0.0
    gpu_memory_peak: float = 0.0

    def split(self) -> dict[str, float]:
        """Return how the total divides among the parts; those of all steps are estimated from the sampled ones.

        The wait for data is measured at each step; on a GPU, which works meanwhile, it counts as far as the steps
        took longer than their computing.
        """
        wait, inside = float(self.wait.sum()), {"steps": self.training}
        if len(self.sampled):
            weights = np.diff(self.sampled, append=self.first_step + len(self.step))
            inside = {name: float(weights @ getattr(self, name)) for name in STEP_PARTS}
            computing = sum(inside.values())
            if self.device != "cpu":
                slowest = computing * len(self.step) / max(weights.sum(), 1)
                wait = min(wait, max(0.0, self.training - slowest))
            inside = {name: part / computing * (self.training - wait) for name, part in inside.items()}
        else:
            inside["steps"] -= wait
        return {
            "initialisation": self.initialisation,
            "data": wait,
            **inside,
            "validation": self.validation,
            "logging": self.logging,
        }


@dataclass(frozen=True)
class Recording:
    """All that rules look at; `recipe` is flat: dotted name → value."""

    recipe: dict[str, Any]
    curves: Curves
    tensors: Tensors | None = None
    data: Data | None = None
    sweep: Sweep | None = None
    times: Times | None = None


def write_part(path: Path, part: Any) -> None:
    """Write one part as `.npz`; equal content gives equal bytes."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in values.items() if name not in arrays}
    np.savez_compressed(path, plain=np.array(json.dumps(plain)), **arrays)  # type: ignore[arg-type]


def read_part(path: Path, kind: type[Part]) -> Part:
    """Read what `write_part` wrote.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            plain = json.loads(str(stored["plain"]))
            arrays = {name: stored[name] for name in stored.files if name != "plain"}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        return kind(**values, **arrays)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train again to record it") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is no recording of this version ({reason}): train again") from None


PARTS: dict[str, type] = {"curves": Curves, "tensors": Tensors, "data": Data}
RECIPE, TIMES, SWEEP = "recipe.json", "times.npz", "sweep.npz"


def write_recording(recording: Recording, folder: Path) -> None:
    """Write all but times and range test into `folder`: what recipe, data and code decide."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(json.dumps(recording.recipe, indent=1, sort_keys=True) + "\n")
    for name in PARTS:
        part = getattr(recording, name)
        if part is not None:
            write_part(folder / f"{name}.npz", part)


def write_sheet(recording: Recording, sheet: Path) -> None:
    """Write times and range test, where there are any."""
    for name, part in ((TIMES, recording.times), (SWEEP, recording.sweep)):
        if part is not None:
            write_part(sheet / name, part)


def read_recording(folder: Path, sheet: Path | None = None) -> Recording:
    """Read what `write_recording` wrote, and from another folder what `write_sheet` did.

    Raises:
        UserError: something is missing, damaged, or of another version.
    """
    try:
        recipe = json.loads((folder / RECIPE).read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no recording of a training: train again to record it") from None
    parts: dict[str, Any] = {
        name: read_part(folder / f"{name}.npz", kind)
        for name, kind in PARTS.items()
        if name == "curves" or (folder / f"{name}.npz").exists()
    }
    if sheet is not None and (sheet / TIMES).exists():
        parts["times"] = read_part(sheet / TIMES, Times)
    if sheet is not None and (sheet / SWEEP).exists():
        parts["sweep"] = read_part(sheet / SWEEP, Sweep)
    return Recording(recipe=recipe, **parts)
