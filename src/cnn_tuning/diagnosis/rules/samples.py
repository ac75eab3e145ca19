"""What the rules on recorded statistics share: whether there are enough, typical values, names, remedies.

A sample stands for the steps up to the next one: the recorder looks at each of the first steps and seldom later,
so that a plain median over samples would tell of the start only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.recording import Recording, Tensors
from cnn_tuning.diagnosis.rules.remedy import Patch, Recipe, rate_of, rounded, warmed_up

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


def better_signal(recording: Recording, advice: str, since: int) -> tuple[Patch, str]:
    """Return a patch that lets signals and gradients through, and the advice with what the patch does.

    `since`: the first sample at which they did not come through. Where the network has no argument for it, a lower
    rate may help against what began after the first update; what began before is its code's alone.
    """
    recipe, patch = recording.recipe, good_start(recording)
    if patch:
        return patch, advice
    if recipe.get("model.arguments.normalisation") is False:
        patch["model.arguments.normalisation"] = True
    if recipe.get("model.arguments.activation") in ("sigmoid", "tanh"):
        patch["model.arguments.activation"] = "relu"
    if patch:
        return patch, advice
    if since > 0:
        return slower(recording), f"{advice}; it began after the first update: lower the learning rate"
    return {}, f"{advice}: in the network's code, or with another network (model=…)"


def even_steps(recipe: Recipe) -> tuple[Patch, str]:
    """Return a patch that lets each layer learn at the same pace, whatever its gradient's size, and what it does.

    Empty where the recipe has it all.
    """
    if recipe["optimizer.name"] == "sgd":
        adam = {"optimizer": {"name": "adam", "learning_rate": 1e-3}}
        return adam, "Adam, whose steps do not depend on the gradient's size, bears it better"
    patch = warmed_up(recipe)
    if not recipe["trainer.gradient_clip"]:
        patch["trainer.gradient_clip"] = 1.0
    return patch, "a longer warm-up and clipped gradients make up for some of it" if patch else ""


def good_start(recording: Recording) -> Patch:
    """Return a patch to He's initialisation where the recipe departs from it."""
    usual = {"model.arguments.initial_scale": 1.0, "model.arguments.initial_bias": 0.0}
    return {name: value for name, value in usual.items() if recording.recipe.get(name, value) != value}


def slower(recording: Recording) -> Patch:
    """Return a patch to a tenth of the learning rate."""
    return {"optimizer.learning_rate": rounded(rate_of(recording) / 10)}
