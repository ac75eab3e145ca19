"""Rules on gradients, weights and their updates. Those on what layers put out are in `signals`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Floats, Recording, Tensors
from cnn_tuning.diagnosis.rules.remedy import Patch, rate_of, rounded, suggested_rate
from cnn_tuning.diagnosis.rules.samples import (
    HUGE,
    SAMPLES,
    START,
    better_signal,
    even_steps,
    good_start,
    listed,
    mean,
    missing,
    named,
    nth_largest,
    slower,
    typical,
)

# The share of its size that a weight is moved by in a step where training goes well (Karpathy, CS231n).
GOOD_UPDATE = 1e-3


def vanishing_gradients(recording: Recording, *, floor: float, spread: float, learnt: float) -> Finding:
    """A trained layer gets next to no gradient, yet some, while there is still something to learn."""
    rule, tensors = "vanishing_gradients", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    open_steps = _to_learn(recording, tensors, learnt)
    if open_steps.sum() < SAMPLES:
        return not_evaluated(rule, f"the loss fell below {learnt:.0%} of the first one within a few steps")
    trained, step = tensors.trainable == 1, tensors.step[open_steps]
    average, size = tensors.gradient_mean[open_steps], tensors.gradient_rms[open_steps]
    with np.errstate(all="ignore"):
        share = size / _largest(size[:, trained])
    # A gradient of exactly 0 has other causes: `zero_tensors` and `dead_relus` tell of it.
    low = (average > 0) & ((average < floor) | (share < spread)) & trained
    held = typical(low.astype(np.float32), step) > 0
    means, shares = typical(average, step), typical(share, step)
    least = _smallest(np.where(held if held.any() else trained & (means > 0), means, np.nan))
    layer, names = tensors.layers[least], named(tensors.layers, held)
    evidence = {
        "layer": layer,
        "mean |gradient|": float(means[least]),
        "share of the largest": float(shares[least]),
    }
    if not names:
        if not (means[trained] > 0).any():
            return not_evaluated(rule, "no layer got a gradient in most steps")
        return ok(rule, f"the least gradient is that of {layer}, {means[least]:.1e} on average", evidence)
    at = low[:, held].any(axis=1)
    remedy, advice = better_signal(
        recording, "normalise after each layer, use ReLUs, or make the network shallower", int(at.argmax())
    )
    if not remedy and recording.recipe["optimizer.name"] == "sgd":
        remedy, meanwhile = even_steps(recording.recipe)
        advice += f"; {meanwhile}"
    return fired(
        rule,
        f"next to no gradient reaches {listed(names)}: its mean size in {layer} is {means[least]:.1e}, "
        f"{shares[least]:.1e} of that in the layer with the largest",
        evidence={**evidence, "layers": names},
        advice=advice,
        remedy=remedy,
        first_step=int(step[at][0]),
    )


def exploding_gradients(recording: Recording, *, relative_gradient: float, samples: float) -> Finding:
    """Gradients are many times as large as the weights that they are to change, before any clipping."""
    rule, tensors = "exploding_gradients", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    with np.errstate(all="ignore"):
        relative = np.where(tensors.weight_rms > 0, tensors.gradient_rms / tensors.weight_rms, np.nan)
    relative = np.nan_to_num(relative, nan=0.0, posinf=HUGE)
    layer = int(nth_largest(relative, samples).argmax())
    peak, name = float(relative[:, layer].max()), tensors.layers[layer]
    above = (relative > relative_gradient)[:, layer]
    evidence = {"layer": name, "gradient to weight at most": peak, "sampled steps above": int(above.sum())}
    if above.sum() < samples:
        return ok(rule, f"gradients are at most {relative.max():.2g} times as large as weights", evidence)
    clip = float(recording.recipe.get("trainer.gradient_clip", 0.0))
    if 0 < clip <= 1:
        return ok(
            rule, f"gradients of {name} are up to {peak:.2g} times its weights, and clipped to {clip:g}", evidence
        )
    return fired(
        rule,
        f"gradients of {name} are up to {peak:.2g} times as large as its weights, in {above.sum()} of "
        f"{len(above)} sampled steps above {relative_gradient:g}",
        evidence=evidence,
        advice="clip gradients; where it is so from the first step, start with smaller weights",
        remedy={"trainer.gradient_clip": 1.0, **good_start(recording)},
        first_step=int(tensors.step[above][0]),
    )


def update_ratio(recording: Recording, *, most: float, samples: float, least_in_all: float) -> Finding:
    """A step replaces a good part of a layer's weights, or all planned steps together hardly move any layer."""
    rule, tensors = "update_ratio", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    ratio = np.where(tensors.trainable == 1, tensors.update_ratio, np.nan)
    if np.isnan(ratio).all():
        return not_evaluated(rule, "no layer is trained, or all weights are 0")
    high = nth_largest(np.nan_to_num(ratio, nan=0.0, posinf=HUGE), samples)
    means = np.nan_to_num(mean(ratio, tensors.step), nan=-1.0, posinf=HUGE)
    fastest, steps = int(means.argmax()), max(recording.curves.planned_steps, int(tensors.step[-1]))
    evidence = {"largest": float(high.max()), "mean": float(means[fastest]), "planned steps": steps}
    if high.max() > most:
        name, above = tensors.layers[int(high.argmax())], ratio[:, int(high.argmax())] > most
        return fired(
            rule,
            f"single steps change {name} by more than {most:.0%} of its size, in {above.sum()} sampled steps",
            evidence={**evidence, "layer": name},
            advice="lower the learning rate, or warm up",
            remedy=slower(recording),
            first_step=int(tensors.step[above][0]),
        )
    if not np.nan_to_num(tensors.gradient_rms).any():
        return not_evaluated(rule, "no layer got a gradient")
    if means[fastest] * steps < least_in_all:
        return fired(
            rule,
            f"a step changes even {tensors.layers[fastest]}, the fastest layer, by {means[fastest]:.1e} of its "
            f"size: {means[fastest] * steps:.1e} in all of {steps:,} steps",
            evidence={**evidence, "layer": tensors.layers[fastest]},
            advice="raise the learning rate",
            remedy=_faster(recording, tensors),
            first_step=int(tensors.step[0]),
        )
    return ok(rule, f"a step changes {tensors.layers[fastest]} by {means[fastest]:.1e} on average", evidence)


def unchanged_weights(recording: Recording, *, change: float) -> Finding:
    """A layer that is to be trained stays as it was, or only weight decay moves it."""
    rule, tensors = "unchanged_weights", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    trained = tensors.trainable == 1
    if not trained.any():
        return not_evaluated(rule, "no layer is trained")
    # A weight that was 0 has no relative change: it moved if it is no longer 0.
    moved = np.where(np.isnan(tensors.changed), np.where(tensors.weight_rms[-1] > 0, HUGE, 0), tensors.changed)
    # A gradient that was never measured: of a stage that was frozen at each sample, or, where nothing moved, none.
    measured = (tensors.gradient_rms == 0).any(axis=0)
    silent = ~(tensors.gradient_rms > 0).any(axis=0) & (measured | (moved < change))
    still = trained & ((moved < change) | silent)
    names = named(tensors.layers, still)
    slowest = int(np.where(trained, moved, np.inf).argmin())
    evidence = {"layer": tensors.layers[slowest], "relative change": float(moved[slowest])}
    if not names:
        return ok(rule, f"{tensors.layers[slowest]} changed least, by {moved[slowest]:.1e} of its size", evidence)
    zero, faster = named(tensors.layers, still & silent), _faster(recording, tensors)
    why = f"; no gradient ever reached {listed(zero)}" if zero else ""
    steps = max(len(recording.curves.loss), int(tensors.step[-1]))
    remedy, advice = faster, "raise the learning rate"
    if zero:
        remedy, advice = better_signal(recording, "look for dead units or a cut in the graph", 0)
    elif not faster:
        advice = "look for dead units or a cut in the graph"
    return fired(
        rule,
        f"{steps:,} steps changed {listed(names)} by less than {change:g} of its size{why}",
        evidence={**evidence, "layers": names, "without a gradient": zero},
        advice=advice,
        remedy=remedy,
        first_step=int(tensors.step[0]),
    )


def zero_tensors(recording: Recording, *, zero_share: float) -> Finding:
    """All weights of a layer are 0, or its gradient is, in half of the training or more."""
    rule, tensors = "zero_tensors", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    trained = tensors.trainable == 1
    weights = np.nan_to_num(tensors.weight_zero[-1])
    gradients = np.where(trained, np.nan_to_num(typical(tensors.gradient_zero, tensors.step)), 0.0)
    zero_weights, zero_gradients = weights >= zero_share, gradients >= zero_share
    evidence = {"most zeros in weights": float(weights.max()), "in gradients": float(gradients.max())}
    if not (zero_weights | zero_gradients).any():
        return ok(rule, f"at most {gradients.max():.0%} of a layer's gradient is 0", evidence)
    found = {"weights": named(tensors.layers, zero_weights), "gradients": named(tensors.layers, zero_gradients)}
    at = (tensors.weight_zero >= zero_share) & zero_weights | (
        tensors.gradient_zero >= zero_share
    ) & zero_gradients
    first = int(at.any(axis=1).argmax())
    remedy, advice = better_signal(
        recording, "draw the weights at random; where they are not 0, look for units that are never active", first
    )
    return fired(
        rule,
        " and ".join(f"all {what} of {listed(names)} are 0" for what, names in found.items() if names),
        evidence={**evidence, **found},
        advice=advice,
        remedy=remedy if first < START else slower(recording),
        first_step=int(tensors.step[first]),
    )


def _faster(recording: Recording, tensors: Tensors) -> Patch:
    """Return a patch to the rate of the range test, or to one that moves the fastest layer as is usual.

    Empty where some layer moves as much already: the rate is not to blame then.
    """
    rate, better = rate_of(recording), suggested_rate(recording)
    ratio = np.nanmax(np.append(mean(tensors.update_ratio, tensors.step), 0))
    usual = rate * min(GOOD_UPDATE / max(ratio, 1e-12), 1e6)
    if usual <= rate:
        return {}
    return {"optimizer.learning_rate": rounded(better if better is not None and better > rate else usual)}


def _to_learn(recording: Recording, tensors: Tensors, learnt: float) -> NDArray[np.bool_]:
    """Return at which samples the loss was still above the share `learnt` of the first one."""
    loss = recording.curves.loss
    seen = loss[np.isfinite(loss)]
    if len(seen) == 0:
        return np.ones(len(tensors.step), bool)
    now = np.array([loss[step - 1] if step <= len(loss) else np.nan for step in tensors.step])
    return ~(now <= learnt * seen[0])


def _largest(values: Floats) -> NDArray[np.float64]:
    """Return the largest finite value of each row as a column, 0 where there is none."""
    return np.nan_to_num(values, nan=0.0, posinf=0.0).max(axis=1, initial=0.0)[:, None].astype(np.float64)


def _smallest(values: NDArray[np.float64]) -> int:
    return int(np.where(np.isnan(values), np.inf, values).argmin())
