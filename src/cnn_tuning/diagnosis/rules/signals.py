"""Rules on what layers and activations put out: a poor start, units that never fire or are stuck at a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Recording, Tensors
from cnn_tuning.diagnosis.rules.samples import (
    HUGE,
    START,
    better_signal,
    even_steps,
    listed,
    missing,
    named,
    slower,
    typical,
)


def poor_initialisation(recording: Recording, *, variance_ratio: float, gradient_spread: float) -> Finding:
    """In the first step the signal fades or grows from layer to layer, or some layer's gradient does."""
    rule, tensors = "poor_initialisation", recording.tensors
    if tensors is None or len(tensors.step) == 0 or len(tensors.layers) < 2:
        return not_evaluated(rule, "no statistics of several layers were recorded: set diagnosis.record: true")
    if tensors.step[0] != 1:
        return not_evaluated(rule, f"the first sampled step is {tensors.step[0]}: the start was not seen")
    variance = _known(tensors, tensors.output_variance[0])
    gradient = _known(tensors, np.where(tensors.trainable == 1, tensors.gradient_rms[0], np.nan))
    if len(variance) < 2 and len(gradient) < 2:
        return not_evaluated(rule, "neither outputs nor gradients of several layers are known of the first step")
    ratio, spread = _ratio(variance), 1 / _ratio(gradient)
    evidence: dict[str, Any] = {"variances": variance, "gradients": gradient, "gradient spread": spread}
    if variance:
        evidence["variance ratio"] = ratio
    if ratio <= variance_ratio and spread >= gradient_spread:
        told = f"outputs of layers differ {ratio:.2g}-fold in variance, gradients {1 / spread:.2g}-fold"
        if not variance:
            told = f"gradients of layers differ {1 / spread:.2g}-fold; what they put out was not seen"
        return ok(rule, told, evidence)
    seen = []
    if ratio > variance_ratio:
        seen.append(f"the variance of what layers put out is {_extremes(variance)}")
    if spread < gradient_spread:
        seen.append(f"the root mean square of gradients is {_extremes(gradient)}")
    remedy, advice = better_signal(
        recording, "start with He's (ReLU) or Glorot's (tanh, sigmoid) weights, or normalise after each layer", 0
    )
    if not remedy and any(gradient.values()):
        remedy, meanwhile = even_steps(recording.recipe)
        advice += f"; {meanwhile}" if meanwhile else ""
    return fired(
        rule,
        f"in the first step {' and '.join(seen)}",
        evidence=evidence,
        advice=advice,
        remedy=remedy,
        first_step=1,
    )


def dead_relus(recording: Recording, *, dead_share: float) -> Finding:
    """Most units of a layer put out 0 for nearly every image, up to the end of what was recorded."""
    rule, tensors = "dead_relus", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    rectifiers = ~np.isnan(tensors.dead[-1])
    if not rectifiers.any():
        return not_evaluated(rule, "the network has no ReLU, or none was seen")
    dead = np.where(rectifiers, tensors.dead, -1.0)
    # Two samples in a row: the last one alone may be of one unlucky batch.
    above = np.asarray((dead[-2:] > dead_share).all(axis=0))
    shares = dict(zip(named(tensors.activations, rectifiers), _numbers(tensors.dead[-1][rectifiers]), strict=True))
    if not above.any():
        return ok(rule, f"at most {dead[-1].max():.0%} of a layer's units are dead", {"dead": shares})
    worst = int(np.where(above, dead[-1], -1.0).argmax())
    since = _since(dead[:, worst] > dead_share)
    names = named(tensors.activations, above)
    remedy, advice = slower(recording), "lower the learning rate, or warm up"
    if since < START:
        remedy, advice = better_signal(recording, "start with He's weights and a bias of 0", since)
    return fired(
        rule,
        f"{dead[-1, worst]:.0%} of the units of {tensors.activations[worst]} are dead, "
        f"above {dead_share:.0%} in {listed(names)}",
        evidence={"dead": shares, "layers": names},
        advice=advice,
        remedy=remedy,
        first_step=int(tensors.step[since]),
    )


def saturated_activations(recording: Recording, *, saturated_share: float) -> Finding:
    """Most outputs of a bounded activation are at a bound, where its slope is next to 0."""
    rule, tensors = "saturated_activations", recording.tensors
    reason = missing(tensors)
    if tensors is None or reason:
        return not_evaluated(rule, reason)
    shares = typical(tensors.saturated, tensors.step)
    bounded = ~np.isnan(shares)
    if not bounded.any():
        return not_evaluated(rule, "no activation of the network has bounds, or none was seen")
    evidence = {
        "saturated": dict(zip(named(tensors.activations, bounded), _numbers(shares[bounded]), strict=True))
    }
    worst = int(np.nanargmax(shares))
    if not shares[worst] > saturated_share:
        return ok(rule, f"at most {shares[worst]:.0%} of a layer's outputs are at a bound", evidence)
    names = [n for n, share in zip(tensors.activations, shares, strict=True) if share > saturated_share]
    held = tensors.saturated[:, worst] > saturated_share
    remedy, advice = better_signal(
        recording, "start with smaller weights, normalise before the activation, or use ReLUs", int(held.argmax())
    )
    return fired(
        rule,
        f"{shares[worst]:.0%} of the outputs of {tensors.activations[worst]} ({tensors.kinds[worst]}) are at a "
        f"bound, above {saturated_share:.0%} in {listed(names)}",
        evidence={**evidence, "layers": names},
        advice=advice,
        remedy=remedy,
        first_step=int(tensors.step[held][0]),
    )


def _known(tensors: Tensors, values: NDArray[Any]) -> dict[str, float]:
    return {name: float(v) for name, v in zip(tensors.layers, values, strict=True) if not np.isnan(v)}


def _ratio(values: dict[str, float]) -> float:
    """Return the largest by the smallest; a number that JSON holds where something is 0 or infinite."""
    if not values:
        return 1.0
    least, most = min(values.values()), max(values.values())
    return min(most / least, HUGE) if least > 0 else HUGE


def _extremes(values: dict[str, float]) -> str:
    low, high = min(values, key=lambda name: values[name]), max(values, key=lambda name: values[name])
    if values[high] == 0:
        return "0 in all layers"
    return f"{values[low]:.1e} at {low} and {values[high]:.1e} at {high}"


def _numbers(values: NDArray[Any]) -> list[float]:
    return [round(float(value), 4) for value in values]


def _since(held: NDArray[np.bool_]) -> int:
    """Return the first sample from which it held to the end."""
    broken = np.flatnonzero(~held)
    return int(broken[-1]) + 1 if len(broken) else 0
