"""Rules on the learning rate: from the step losses, the size of updates, and the range test where there is one."""

from __future__ import annotations

import math

import numpy as np

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.diagnosis.rules.course import Course, course_of, creeps, exploded_at, unfinished
from cnn_tuning.diagnosis.rules.loss import typical_update
from cnn_tuning.diagnosis.rules.remedy import rate_of, rounded, suggested_rate

# The course is cut into so many parts to see whether its level comes up again.
PARTS = 12


def learning_rate_too_high(
    recording: Recording, *, rise: float, rebound: float, material: float, update: float
) -> Finding:
    """The loss breaks, shoots up or comes up again later, updates are large, or the range test says so."""
    rule, curves, rate = "learning_rate_too_high", recording.curves, rate_of(recording)
    course = course_of(recording)
    limit, better = _limit(recording), suggested_rate(recording)
    if isinstance(course, str) and curves.not_finite_step < 0 and limit is None:
        return not_evaluated(rule, course)
    seen: list[tuple[int, str]] = []
    broken = curves.not_finite_step >= 0
    if broken:
        seen.append((curves.not_finite_step, f"the loss is not finite at step {curves.not_finite_step:,}"))
    if not isinstance(course, str):
        at = exploded_at(course, rise)
        if at is not None:
            broken = True
            seen.append((at, f"the loss shot up to {course.loss.max():.3g} after a start at {course.start:.3g}"))
        low, high, at_high = _rebound(course)
        if high > rebound * low and high - low > material * course.start:
            seen.append((at_high, f"the loss was down at {low:.2g} and came up again to {high:.2g}"))
    moved = typical_update(recording)
    if moved > update:
        seen.append((1, f"a median step changes a layer by {moved:.0%} of its size"))
    if limit is not None and rate > limit:
        seen.append((1, f"in the range test the loss rises above {limit:.1e}"))
    evidence = {"learning rate": rate, "suggested": better, "highest by range test": limit, "update ratio": moved}
    evidence = {name: value for name, value in evidence.items() if value is not None and not math.isnan(value)}
    if not seen:
        return ok(rule, f"the loss does not run away at a learning rate of {rate:g}", evidence)
    target = better if better is not None and better < rate else rate / (10 if broken else 3)
    return fired(
        rule,
        f"at a learning rate of {rate:g} " + "; ".join(text for _, text in seen),
        evidence=evidence,
        advice="lower the learning rate",
        remedy={"optimizer.learning_rate": rounded(target)},
        first_step=min(step for step, _ in seen),
    )


def learning_rate_too_low(recording: Recording, *, left: float, factor: float, update: float) -> Finding:
    """Much of the loss is left at the end, and it fell steadily but slowly, or hardly anything moved."""
    rule, rate, course = "learning_rate_too_low", rate_of(recording), course_of(recording)
    if isinstance(course, str):
        return not_evaluated(rule, course)
    better, moved = suggested_rate(recording), typical_update(recording)
    level, _ = course.end(0.1)
    share = level / course.start
    evidence = {"learning rate": rate, "suggested": better, "loss left": share, "update ratio": moved}
    evidence = {name: value for name, value in evidence.items() if value is not None and not math.isnan(value)}
    if share <= left:
        return ok(rule, f"{1 - share:.0%} of the loss was learnt away at a learning rate of {rate:g}", evidence)
    if exploded_at(course, 2.0) is not None:
        return ok(rule, "the loss shot up: the rate is not too low", evidence)
    seen = []
    # That a loss still falls is a fault only once nothing is left to come.
    reason = unfinished(recording) if creeps(course) else ""
    if creeps(course) and not reason:
        seen.append("it still falls as steadily as at first")
    if moved < update:
        seen.append(f"a median step changes no layer by more than {moved:.1e} of its size")
    if better is not None and better > factor * rate:
        seen.append(f"the range test suggests {better:.1e}")
    if not seen and reason:
        return not_evaluated(rule, f"{reason}, and the loss still falls")
    if not seen or (better is not None and better < rate):
        return ok(rule, f"{share:.0%} of the loss is left, but not for slowness", evidence)
    return fired(
        rule,
        f"{share:.0%} of the loss is left after {course.step[-1]:,} steps at {rate:g}; " + "; ".join(seen),
        evidence=evidence,
        advice="raise the learning rate",
        remedy={"optimizer.learning_rate": rounded(better if better is not None else rate * 10)},
        first_step=int(course.step[0]),
    )


def _rebound(course: Course) -> tuple[float, float, int]:
    """Return the lowest part before the part that stands highest above it, that part, and its first step."""
    _, loss = course.blocks
    if len(loss) < 2 * PARTS:
        return 0.0, 0.0, 0
    level = np.array([part.mean() for part in np.array_split(loss, PARTS)])
    lowest = np.minimum.accumulate(level)
    worst = int((level - lowest).argmax())
    at = int(course.step[round(worst * len(course.step) / PARTS)])
    return float(lowest[worst]), float(level[worst]), at


def _limit(recording: Recording) -> float | None:
    """Return twice the rate of the range test's least loss; a third of it for a rate that is not annealed.

    A schedule that anneals bears its peak only for a while. None without a range test whose loss fell.
    """
    if recording.sweep is None or suggested_rate(recording) is None:
        return None
    edge = float(recording.sweep.learning_rate[int(recording.sweep.loss.argmin())])
    return 2 * edge if recording.recipe["schedule.name"] in ("one_cycle", "cosine") else edge / 3
