"""The search space: a trial comes in, its values by dotted name and its recipe go out; where a search begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import (
    Choice,
    Dimension,
    FloatRange,
    Recipe,
    SearchConfig,
    applies,
    changes_of,
    flatten,
    grid,
    label_of,
    levels_of,
    patch,
    to_plain,
)

if TYPE_CHECKING:
    import optuna

Chosen = dict[str, Any]  # dotted name → label of a choice, or a number


def suggest(trial: optuna.Trial, search: SearchConfig) -> Chosen:
    """Return a trial's values; dimensions that do not apply are left out."""
    chosen: Chosen = {}
    for name, dimension in search.space.items():
        if applies(dimension, _labels(chosen)):
            chosen[name] = _suggest(trial, name, dimension)
    return chosen


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(name, list(levels_of(dimension.choices)))
    if isinstance(dimension, FloatRange):
        return trial.suggest_float(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    return trial.suggest_int(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def common_recipe(search: SearchConfig, recipe: Recipe) -> Recipe:
    """Return what all trials share: the experiment's recipe with the search's settings."""
    return patch(recipe, search.settings, "search.settings")


def trial_recipe(search: SearchConfig, recipe: Recipe, chosen: Mapping[str, Any]) -> Recipe:
    """Return a trial's recipe."""
    return patch(common_recipe(search, recipe), changes_of(search, chosen), "search.space")


def most_epochs(search: SearchConfig, recipe: Recipe) -> int:
    """Return the epochs of the longest trial."""
    dimension = search.space.get("trainer.max_epochs")
    if dimension is None:
        return common_recipe(search, recipe).trainer.max_epochs
    if isinstance(dimension, Choice):
        return max(levels_of(dimension.choices).values())
    return int(dimension.high)


def first_values(search: SearchConfig, recipe: Recipe) -> tuple[list[Chosen], int]:
    """Return for each trial of the budget what is decided before any is run, and how many points are left out.

    A grid decides all. Any other search begins with the experiment's own values, so that it cannot end below
    its start; those outside the space are sampled.
    """
    if search.sampler.name != "grid":
        return [own_values(search, recipe), *({} for _ in range(search.budget.trials - 1))], 0
    points = grid(search)
    taken = list(itertools.islice(points, search.budget.trials))
    return taken, sum(1 for _ in points)


def own_values(search: SearchConfig, recipe: Recipe) -> Chosen:
    """Return the experiment's own values, where they lie inside the space."""
    common = common_recipe(search, recipe)
    flat = flatten(to_plain(common))
    chosen: Chosen = {}
    for name, dimension in search.space.items():
        if not applies(dimension, _labels(chosen)):
            continue
        if isinstance(dimension, Choice):
            # Of a section, what is searched by itself may differ: it is compared by its own dimension.
            inner = {other for other in search.space if other.startswith(f"{name}.")}
            own = _without(common, inner)
            levels = levels_of(dimension.choices).items()
            same = (label for label, value in levels if _without(patch(common, {name: value}), inner) == own)
            found = next(same, None)
        else:
            found = flat[name] if name in flat and _contains(dimension, flat[name]) else None
        if found is not None:
            chosen[name] = found
    return chosen


def _without(recipe: Recipe, names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in flatten(to_plain(recipe)).items() if name not in names}


def _contains(dimension: Any, value: Any) -> bool:
    if not isinstance(value, int | float) or not dimension.low <= value <= dimension.high:
        return False
    if dimension.step is None:
        return True
    steps = (value - dimension.low) / dimension.step
    return math.isclose(steps, round(steps), abs_tol=1e-9)


def _labels(chosen: Mapping[str, Any]) -> dict[str, str]:
    return {name: label_of(value) for name, value in chosen.items()}
