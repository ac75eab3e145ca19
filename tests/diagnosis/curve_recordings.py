"""Recordings with made-up curves and answers, the thresholds that are shipped, and remedies tried on recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cnn_tuning.config import Config, Recipe, compose, flatten, patch, select, to_plain
from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.recording import Curves, Data, Recording
from cnn_tuning.diagnosis.rules import RULES

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = ("mnist", "lab", "digits", "cifar10")


@cache
def config_of(experiment: str) -> Config:
    return compose([f"experiment={experiment}"], params=None, conf=CONF)


def recipe_of(experiment: str, **changes: Any) -> dict[str, Any]:
    """Return a flat recipe; `changes` are dotted names with `__` for the dot."""
    recipe = select(Recipe, config_of(experiment))
    return flatten(to_plain(patch(recipe, {name.replace("__", "."): value for name, value in changes.items()})))


def recording(
    loss: Sequence[float] = (),
    *,
    rate: Sequence[float] | float = 1e-3,
    epochs: Sequence[tuple[float, float, float, float]] = (),
    data: Data | None = None,
    experiment: str = "lab",
    planned: int | None = None,
    **changes: Any,
) -> Recording:
    """Return a recording; `epochs` are rows of train loss and accuracy, val loss and accuracy."""
    losses = np.array(loss, np.float32)
    rows = np.array(epochs, np.float32).reshape(-1, 4)
    each = max(1, len(losses) // max(1, len(rows)))
    curves = Curves(
        loss=losses,
        learning_rate=np.broadcast_to(np.array(rate, np.float32), losses.shape).copy(),
        epoch_step=np.arange(1, len(rows) + 1, dtype=np.int64) * each,
        train_loss=rows[:, 0],
        train_accuracy=rows[:, 1],
        val_loss=rows[:, 2],
        val_accuracy=rows[:, 3],
        steps_per_epoch=each,
        planned_steps=len(losses) if planned is None else planned,
    )
    return Recording(recipe_of(experiment, **changes), curves, data=data)


def answers(
    table: Sequence[Sequence[int]], *, counts: Sequence[int] | None = None, sure: float = 0.95, **values: Any
) -> Data:
    """Return evidence whose confusion matrix is `table`: rows are labels, columns answers given `sure`ly."""
    matrix = np.array(table)
    classes = len(matrix)
    labels = np.repeat(np.arange(classes), matrix.sum(1))
    given = np.concatenate([np.repeat(np.arange(classes), row) for row in matrix])
    probabilities = np.full((len(labels), classes), (1 - sure) / max(classes - 1, 1), np.float32)
    probabilities[np.arange(len(labels)), given] = sure
    data = Data(
        classes=tuple(f"class {i}" for i in range(classes)),
        counts=np.array(counts if counts is not None else [1000] * classes, np.int64),
        input_mean=np.zeros(1, np.float32),
        input_std=np.ones(1, np.float32),
        labels=labels.astype(np.int64),
        probabilities=probabilities,
        shared=np.empty((0, 2), np.int64),
        repeated=0,
        conflicting=0,
    )
    return replace(data, **values)


def judged(rule: str, of: Recording, **thresholds: float) -> Finding:
    """Return a rule's finding with the thresholds that are shipped, some of them changed."""
    shipped = config_of("mnist").diagnosis.rules[rule].thresholds
    return RULES[rule](of, **{**shipped, **thresholds})


def check_remedy(finding: Finding, experiments: Sequence[str] = EXPERIMENTS) -> None:
    """Apply the remedy to recipes: `patch` raises where a name or a value is wrong."""
    assert finding.advice
    for experiment in experiments:
        recipe = select(Recipe, config_of(experiment))
        if finding.remedy:
            assert patch(recipe, finding.remedy) is not None
