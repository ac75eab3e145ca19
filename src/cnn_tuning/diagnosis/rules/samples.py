"""What the rules on recorded statistics share: whether there are enough, typical values, names, remedies.

A sample stands for the steps up to the next one: the recorder looks at each of the first steps and seldom later,
so that a plain median over samples would tell of the start only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.recording import Recording, Tensors
from cnn_tuning.diagnosis.rules.remedy import Patch, rate_of, rounded

# Fewer samples say nothing of a training; the recorder takes as many in the first five steps.
SAMPLES = 5
# What is so at the first samples already is the fault of the start, not of the learning rate.
START = 2
# Instead of infinity, which JSON does not know.
HUGE = 1e30


def missing(tensors: Tensors | None) -> str:
    """Return why nothing can be said of a training; empty where enough was recorded."""
    if tensors is None:
        return "no statistics were recorded: set diagnosis.record: true"
    if len(tensors.step) < SAMPLES:
        return f"{len(tensors.step)} steps were sampled, {SAMPLES} are needed"
    if not tensors.layers:
        return "the network has no layer with weights"
    return ""


def typical(values: NDArray[Any], step: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the median of each column (K×N) over steps; NaN where nothing was measured."""
    gaps = np.diff(step, append=step[-1] + 1) if len(step) else step
    medians = np.full(values.shape[1], np.nan)
    for column in range(values.shape[1]):
        seen = ~np.isnan(values[:, column])
        if seen.any():
            order = np.argsort(values[seen, column], kind="stable")
            ranked, weights = values[seen, column][order], gaps[seen][order]
            medians[column] = ranked[np.searchsorted(weights.cumsum(), weights.sum() / 2)]
    return medians


def mean(values: NDArray[Any], step: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of each column (K×N) over steps; NaN where nothing was measured."""
    seen = ~np.isnan(values)
    gaps = np.where(seen, np.diff(step, append=step[-1] + 1)[:, None], 0)
    with np.errstate(invalid="ignore"):
        return (np.where(seen, values, 0.0) * gaps).sum(axis=0) / gaps.sum(axis=0)


def nth_largest(values: NDArray[Any], n: float) -> NDArray[Any]:
    """Return the n-th largest of each column: what was reached so many times."""
    rank = min(max(int(n), 1), len(values))
    return np.sort(values, axis=0)[-rank]


def named(names: tuple[str, ...], chosen: NDArray[Any]) -> list[str]:
    """Return the names that are chosen."""
    return [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]


def listed(names: list[str]) -> str:
    """Return names as text, the first three of many."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more layers"


def better_signal(recording: Recording) -> Patch:
    """Return a patch that lets signals and gradients through; empty where the network has no argument for it."""
    recipe, patch = recording.recipe, good_start(recording)
    if patch:
        return patch
    if recipe.get("model.arguments.normalisation") is False:
        patch["model.arguments.normalisation"] = True
    if recipe.get("model.arguments.activation") in ("sigmoid", "tanh"):
        patch["model.arguments.activation"] = "relu"
    return patch


def good_start(recording: Recording) -> Patch:
    """Return a patch to He's initialisation where the recipe departs from it."""
    usual = {"model.arguments.initial_scale": 1.0, "model.arguments.initial_bias": 0.0}
    return {name: value for name, value in usual.items() if recording.recipe.get(name, value) != value}


def slower(recording: Recording) -> Patch:
    """Return a patch to a tenth of the learning rate."""
    return {"optimizer.learning_rate": rounded(rate_of(recording) / 10)}
