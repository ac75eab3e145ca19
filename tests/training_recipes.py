"""Recipes of the digits experiment short enough for a test, and what interrupts and compares their fits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from cnn_tuning.config import Recipe, compose, select

SHORT = {"trainer.max_epochs": 2, "model.dropout": "both", "augment.shift": 0.1, "augment.rotate_degrees": 5.0}
CONF = Path(__file__).parents[1] / "conf"


def recipe_with(overrides: list[str]) -> Recipe:
    """Return the digits recipe of two epochs with overrides."""
    short = ["experiment=digits", "trainer.max_epochs=2"]
    return select(Recipe, compose([*short, *overrides], params=None, conf=CONF))


class SignalAt(Callback):
    """Sends this process a signal after a number of steps, as a spot host or a person would."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum = step, signum

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def same(one, other) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
