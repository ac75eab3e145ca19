"""Patches of a recipe that several rules advise: a flat recipe in, dotted name → value out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.diagnosis.rules.sweep import suggested

Recipe = Mapping[str, Any]
Patch = dict[str, Any]
DROPOUT = {"model.conv_dropout": 0.25, "model.dense_dropout": 0.5}
MOST_DROPOUT = 0.6


def rounded(value: float) -> float:
    """Return a value with two digits."""
    return float(f"{value:.2g}")


def rate_of(recording: Recording) -> float:
    """Return the learning rate of the recipe: the highest of its schedule."""
    return float(recording.recipe["optimizer.learning_rate"])


def suggested_rate(recording: Recording) -> float | None:
    """Return the rate that the range test suggests; None without one, or where its loss does not fall."""
    return None if recording.sweep is None else suggested(recording.sweep)


def regularised(recipe: Recipe) -> tuple[Patch, str]:
    """Return a patch against learning by heart, and what it does: dropout, more of it, augmentation, decay."""
    rates = {name: float(recipe[name]) for name in DROPOUT}
    raised = {name: min(MOST_DROPOUT, rounded(rate * 1.5)) for name, rate in rates.items()}
    if recipe["model.dropout"] != "both":
        missing = {name: DROPOUT[name] for name, rate in rates.items() if not rate}
        return {"model.dropout": "both", **missing}, "drop units in training"
    if not any(recipe[f"augment.{name}"] for name in ("shift", "rotate_degrees", "scale", "cutout")):
        return {"augment.shift": 0.08}, "move the training images at random"
    more = {name: rate for name, rate in raised.items() if rate > rates[name]}
    if more:
        return more, "drop more units in training"
    decay = float(recipe["optimizer.weight_decay"])
    return {"optimizer.weight_decay": rounded(decay * 3) if decay else 1e-4}, "let weights decay more"


def loosened(recipe: Recipe) -> Patch:
    """Return a patch that takes away what keeps a network from fitting its training images, if anything does."""
    usual = {
        "model.dropout": "none",
        "trainer.label_smoothing": 0.0,
        "optimizer.weight_decay": 0.0,
        "augment.rotate_degrees": 0.0,
        "augment.scale": 0.0,
        "augment.shear_degrees": 0.0,
        "augment.cutout": 0.0,
    }
    strong = float(recipe["optimizer.weight_decay"]) * float(recipe["optimizer.learning_rate"]) > 1e-4
    patch = {name: value for name, value in usual.items() if recipe[name] != value}
    if not strong:
        patch.pop("optimizer.weight_decay", None)
    return patch


def warmed_up(recipe: Recipe) -> Patch:
    """Return a patch to a rate that grows in a tenth of the training or longer; empty where it does already."""
    if recipe["schedule.name"] == "one_cycle":
        return {"schedule.initial_division": 25.0} if recipe["schedule.initial_division"] < 25 else {}
    if recipe["schedule.name"] == "plateau":
        return annealed(recipe)
    epochs = rounded(int(recipe["trainer.max_epochs"]) / 10)
    return {} if recipe["schedule.warmup_epochs"] else {"schedule.warmup_epochs": epochs}


def annealed(recipe: Recipe) -> Patch:
    """Return a patch to a schedule that ends low; empty where it is one already."""
    if recipe["schedule.name"] in ("one_cycle", "cosine"):
        return {}
    return {"schedule": {"name": "one_cycle", "cycle_momentum": False}}
