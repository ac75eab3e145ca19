"""Recipes of the digits experiment with overrides, short enough for a test."""

from __future__ import annotations

from pathlib import Path

from cnn_tuning.config import Recipe, compose, select

CONF = Path(__file__).parents[1] / "conf"


def recipe_with(overrides: list[str]) -> Recipe:
    """Return the digits recipe of two epochs with overrides."""
    short = ["experiment=digits", "trainer.max_epochs=2"]
    return select(Recipe, compose([*short, *overrides], params=None, conf=CONF))
