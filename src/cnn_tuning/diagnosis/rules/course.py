"""The step losses of a recording as rules look at them: above what cannot be learnt, against the start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.recording import Recording

Values = NDArray[np.float64]
# One-sided 95 % of a normal distribution: bounds of means over many steps.
Z = 1.645
# Fewer steps say nothing of a course.
FEWEST = 20
# A value of `blocks` stands for at least so many images: the loss of one image may be several times the mean.
IMAGES = 32


@dataclass(frozen=True)
class Course:
    """`step` and `rate` of each seen step with a finite loss; `loss`: its part that can be learnt away.

    `start`: that part for a network that knows nothing: of the first step, or of answering with the classes'
    shares where that is less.
    """

    step: NDArray[np.int64]
    loss: Values
    rate: Values
    start: float
    batch: int

    @property
    def blocks(self) -> tuple[NDArray[np.int64], Values]:
        """Return the first step and the mean loss of blocks of enough images each."""
        size = math.ceil(IMAGES / self.batch)
        count = len(self.loss) // size
        return self.step[: count * size : size], self.loss[: count * size].reshape(count, size).mean(1)

    def end(self, share: float = 0.25) -> tuple[float, float]:
        """Return the mean loss of the last share of the steps, and how far it may be off."""
        return mean_of(self.loss[-max(5, int(len(self.loss) * share)) :])


def course_of(recording: Recording) -> Course | str:
    """Return the course of the step losses, or why there is none to judge."""
    loss = recording.curves.loss.astype(np.float64)
    seen = np.isfinite(loss)
    if seen.sum() < FEWEST:
        return f"{seen.sum()} steps were seen, {FEWEST} are needed"
    if not seen[0]:
        return "the first step was not seen"
    floor = smoothing_floor(recording, float(loss[0]))
    start = min(float(loss[0]), chance(recording)) - floor
    if start <= 0:
        return "the loss of the first step is no more than label smoothing alone gives"
    return Course(
        step=np.flatnonzero(seen) + 1,
        loss=np.maximum(loss[seen] - floor, 0),
        rate=recording.curves.learning_rate.astype(np.float64)[seen],
        start=start,
        batch=int(recording.recipe["trainer.batch_size"]),
    )


def unfinished(recording: Recording) -> str:
    """Return how far a training is that is not over, or was given up; empty where it came to its end."""
    curves = recording.curves
    if recording.data is not None or len(curves.loss) >= curves.planned_steps:
        return ""
    return f"the training is at step {len(curves.loss):,} of {curves.planned_steps:,}"


def smoothing_floor(recording: Recording, first: float) -> float:
    """Return the least mean loss that label smoothing allows."""
    smoothing = float(recording.recipe["trainer.label_smoothing"])
    if not smoothing:
        return 0.0
    known = len(recording.data.classes) if recording.data is not None else round(math.exp(min(first, 10)))
    classes = max(2, known)
    other = smoothing / classes
    right = 1 - smoothing + other
    return -right * math.log(right) - (classes - 1) * other * math.log(other)


def chance(recording: Recording) -> float:
    """Return the loss of always answering with the classes' shares; infinite where they are not known."""
    if recording.data is None or recording.data.counts.sum() == 0:
        return math.inf
    shares = recording.data.counts / recording.data.counts.sum()
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def mean_of(values: Values) -> tuple[float, float]:
    """Return the mean and the half width of its one-sided 95 % bounds."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), Z * error


def exploded_at(course: Course, rise: float) -> int | None:
    """Return the first step from which the loss was above `rise` times the start.

    The start is the first step's loss where that is more: no rate is to blame for it.
    """
    step, loss = course.blocks
    above = np.flatnonzero(loss > rise * max(course.start, float(course.loss[0])))
    return int(step[above[0]]) if len(above) else None


def creeps(course: Course) -> bool:
    """Return whether the loss still falls as it did: steadily, and hardly less for the same sum of rates."""
    way = course.rate.cumsum()
    if not way[-1] > 0:
        return False
    third = np.minimum((3 * way / way[-1]).astype(int), 2)
    parts = [course.loss[third == i] for i in range(3)]
    if min(map(len, parts)) < 3:
        return False
    (first, _), (middle, error), (last, other) = map(mean_of, parts)
    return middle - last > max(math.hypot(error, other), 0.4 * (first - middle)) and first > middle


def decayed(course: Course) -> bool:
    """Return whether the rate ended below a tenth of its highest."""
    return bool(course.rate[-1] < 0.1 * course.rate.max())
