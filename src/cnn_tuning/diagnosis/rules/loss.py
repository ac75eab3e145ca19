"""Rules on the curve of step losses: does it fall, does it rest, does it jump, is it a number."""

from __future__ import annotations

import numpy as np

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.diagnosis.rules.course import Course, Values, course_of, creeps, exploded_at, mean_of
from cnn_tuning.diagnosis.rules.remedy import Patch, annealed, rate_of, rounded, suggested_rate

# Blocks of the running median that single losses are held against.
RUNNING = 25
# A rate below this share of the highest is meant to end the training: what rests then is no stall.
DECAYED = 0.1


def not_finite(recording: Recording) -> Finding:
    """A loss, weight or output is NaN or infinite: the step, and the first layer concerned."""
    curves, rule = recording.curves, "not_finite"
    if len(curves.loss) == 0:
        return not_evaluated(rule, "no step was made")
    if curves.not_finite_step < 0:
        return ok(rule, f"all of {len(curves.loss):,} losses are finite", {"steps": len(curves.loss)})
    rate = rate_of(recording)
    return fired(
        rule,
        f"at step {curves.not_finite_step:,} {curves.not_finite or 'the loss'} is not finite",
        evidence={"first layer": curves.not_finite, "learning rate": rate},
        advice="lower the learning rate and clip gradients",
        remedy={"optimizer.learning_rate": _lower(recording), "trainer.gradient_clip": 1.0},
        first_step=curves.not_finite_step,
    )


def loss_not_decreasing(recording: Recording, *, drop: float) -> Finding:
    """The training loss ends where it began."""
    rule, course = "loss_not_decreasing", course_of(recording)
    if isinstance(course, str):
        return not_evaluated(rule, course)
    level, error = course.end()
    fall = 1 - level / course.start
    evidence = {"start": course.start, "end": level, "fall": fall, "steps": len(course.loss)}
    if level - error <= (1 - drop) * course.start:
        return ok(
            rule, f"the training loss fell by {fall:.0%} of its start in {len(course.loss):,} steps", evidence
        )
    remedy, advice = _other_rate(recording, course)
    return fired(
        rule,
        f"after {course.step[-1]:,} steps the training loss is {level:.3g}, it began at {course.start:.3g}: "
        f"it should have fallen by {drop:.0%}",
        evidence=evidence,
        advice=advice,
        remedy=remedy,
        first_step=_last_below(course, (1 - drop) * course.start),
    )


def stalled(recording: Recording, *, share: float, progress: float, left: float) -> Finding:
    """The training loss fell no further for a good part of the training, though much of it was left."""
    rule, course = "stalled", course_of(recording)
    if isinstance(course, str):
        return not_evaluated(rule, course)
    working = np.flatnonzero(course.rate >= DECAYED * course.rate.max())
    end = int(working[-1]) + 1 if len(working) else len(course.loss)
    rest = course.loss[:end][-int(end * share) :] if int(end * share) else course.loss[:0]
    if len(rest) < 10:
        return not_evaluated(rule, f"{end} steps were made with a rate worth the name: too few to see a rest")
    (before, error), (after, other) = mean_of(rest[: len(rest) // 2]), mean_of(rest[len(rest) // 2 :])
    fall, most = before - after, before - after + float(np.hypot(error, other))
    measured = _measured_fall(recording, int(course.step[end - len(rest)]), int(course.step[end - 1]))
    if measured is not None:
        fall = most = measured
    evidence = {
        "level": after,
        "share of the start": after / course.start,
        "fall": fall / course.start,
        "at most": most / course.start,
        "steps": len(rest),
    }
    if after <= left * course.start:
        return ok(rule, f"the training loss came down to {after / course.start:.1%} of its start", evidence)
    if most >= progress * course.start or creeps(course):
        return ok(
            rule,
            f"the training loss may still fall: by {fall / course.start:.1%} in {len(rest):,} steps",
            evidence,
        )
    return fired(
        rule,
        f"the training loss rests at {after:.3g}, {after / course.start:.0%} of its start: the last {len(rest):,} "
        f"of {end:,} steps lowered it by {max(fall, 0) / course.start:.1%}",
        evidence=evidence,
        advice="choose the learning rate by a range test, and let it fall at the end",
        remedy=_out_of_a_stall(recording, course),
        first_step=int(course.step[end - len(rest)]),
    )


def loss_spikes(recording: Recording, *, deviations: float, height: float) -> Finding:
    """Single step losses stand out of those around them, or all of them rise again."""
    rule, course = "loss_spikes", course_of(recording)
    if isinstance(course, str):
        return not_evaluated(rule, course)
    step, loss = course.blocks
    if len(loss) < RUNNING // 2:
        return not_evaluated(rule, f"{len(loss)} blocks of steps are too few to tell a spike from noise")
    middle, score = _robust_scores(loss)
    spikes = np.flatnonzero((score > deviations) & (loss - middle > height * course.start))
    rise = middle - np.minimum.accumulate(middle)
    worst = int(rise.argmax())
    evidence = {
        "spikes": len(spikes),
        "highest": float(loss.max()),
        "largest rise of the median": float(rise[worst]),
        "start": course.start,
    }
    if not len(spikes) and rise[worst] <= height * course.start:
        return ok(rule, f"no loss stands out of those around it by {height:.0%} of the start", evidence)
    diverged = rise[worst] > height * course.start
    first = int(np.argmax(rise > height * course.start)) if diverged else int(spikes[0])
    seen = (
        f"the running median of the training loss rose by {rise[worst]:.3g} up to step {step[worst]:,}"
        if diverged
        else f"{len(spikes)} of the training losses stand out, the highest with {loss[spikes].max():.3g} at step "
        f"{step[spikes][loss[spikes].argmax()]:,} where {middle[spikes][loss[spikes].argmax()]:.3g} is usual"
    )
    return fired(
        rule,
        seen,
        evidence=evidence,
        advice="clip gradients, warm up, or lower the learning rate",
        remedy=_calmed(recording, diverged),
        first_step=int(step[first]),
    )


def _measured_fall(recording: Recording, first: int, last: int) -> float | None:
    """Return by how much the loss measured after epochs fell between two steps; None for under two epochs.

    It is of the same images each time: it has not the noise of batches.
    """
    curves = recording.curves
    within = (curves.epoch_step >= first) & (curves.epoch_step <= last)
    losses = curves.train_loss[within]
    return float(losses[0] - losses[-1]) if len(losses) > 1 and np.isfinite(losses).all() else None


def _robust_scores(loss: Values) -> tuple[Values, Values]:
    """Return the running median and how many robust deviations each loss lies above it."""
    from scipy.ndimage import median_filter

    middle = median_filter(loss, RUNNING, mode="nearest")
    spread = 1.4826 * median_filter(np.abs(loss - middle), 4 * RUNNING + 1, mode="nearest")
    return middle, (loss - middle) / np.maximum(spread, 1e-12 * max(float(loss.max()), 1e-300))


def _last_below(course: Course, level: float) -> int:
    """Return the step after the last one whose loss was below the level: since then it is too high."""
    below = np.flatnonzero(course.loss < level)
    return int(course.step[min(below[-1] + 1, len(course.step) - 1)]) if len(below) else int(course.step[0])


def _lower(recording: Recording) -> float:
    """Return a tenth of the rate, or what the range test suggests below the present one."""
    rate, better = rate_of(recording), suggested_rate(recording)
    return rounded(better if better is not None and better < rate else rate / 10)


def _other_rate(recording: Recording, course: Course) -> tuple[Patch, str]:
    rate, better = rate_of(recording), suggested_rate(recording)
    if better is not None and not 1 / 1.5 < better / rate < 1.5:
        return {"optimizer.learning_rate": rounded(better)}, "take the learning rate of the range test"
    if exploded_at(course, 2.0) is None and (creeps(course) or _hardly_moves(recording)):
        return {"optimizer.learning_rate": rounded(rate * 10)}, "raise the learning rate"
    return {"optimizer.learning_rate": rounded(rate / 10)}, "lower the learning rate; check labels and inputs"


def _hardly_moves(recording: Recording) -> bool:
    return recording.tensors is not None and typical_update(recording) < 1e-4


def typical_update(recording: Recording) -> float:
    """Return the median of ‖Δw‖/‖w‖ over sampled steps, of the layer that moves most; NaN if not recorded.

    NaN, too, where no layer gets a gradient: that nothing moves is no matter of the rate then.
    """
    tensors = recording.tensors
    if tensors is None or tensors.update_ratio.size == 0 or np.isnan(tensors.update_ratio).all():
        return float("nan")
    from cnn_tuning.diagnosis.rules.samples import typical

    if not np.nan_to_num(typical(tensors.gradient_rms, tensors.step)).any():
        return float("nan")
    return float(np.nanmax(typical(tensors.update_ratio, tensors.step)))


def _out_of_a_stall(recording: Recording, course: Course) -> Patch:
    rate, better = rate_of(recording), suggested_rate(recording)
    if better is not None and not 1 / 1.5 < better / rate < 1.5:
        return {"optimizer.learning_rate": rounded(better)}
    if exploded_at(course, 2.0) is None and _hardly_moves(recording):
        return {"optimizer.learning_rate": rounded(rate * 10)}
    return annealed(recording.recipe) or {"optimizer.learning_rate": rounded(rate / 3)}


def _calmed(recording: Recording, diverged: bool) -> Patch:
    lower = {"optimizer.learning_rate": _lower(recording)}
    clip = {} if recording.recipe["trainer.gradient_clip"] else {"trainer.gradient_clip": 1.0}
    return {**clip, **lower} if diverged else clip or lower
