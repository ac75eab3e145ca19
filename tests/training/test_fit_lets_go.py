"""A fit leaves nothing behind in its process: no trainer, no data, and the signals as they were."""

from __future__ import annotations

import gc
import signal

import pytorch_lightning as pl

from cnn_tuning.config import patch
from cnn_tuning.training.fit import fit


def test_nothing_of_a_fit_stays(recipe, packed, tmp_path):
    others = trainers()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for seed in range(2):
        fit(patch(recipe, {"trainer.max_epochs": 1, "seed": seed}), packed, state_folder=tmp_path, brief=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert trainers() == others


def trainers() -> int:
    gc.collect()
    return sum(type(thing) is pl.Trainer for thing in gc.get_objects())
