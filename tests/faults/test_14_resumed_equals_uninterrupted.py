"""Row 14: a fit that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import signal
import time

import pytest
from pytorch_lightning.callbacks import Callback
from training_recipes import SHORT, SignalAt, same

from cnn_tuning.config import patch
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted


@pytest.mark.parametrize("step", [1, 20, 21, 22, 42])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_14_resumed_equals_uninterrupted(packed, recipe, tmp_path, step, ema):
    short = patch(recipe, SHORT | {"trainer.ema_decay": ema})
    whole = fit(short, packed, state_folder=tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        fit(short, packed, state_folder=tmp_path / "cut", callbacks=[SignalAt(step)])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert stopped.value.saved is not None
    resumed = fit(short, packed, state_folder=tmp_path / "cut")
    assert resumed.resumed_from == step
    assert resumed.history == whole.history
    assert same(resumed.network, whole.network)


class Slow(Callback):
    """Takes its time before the first step of a process."""

    def on_train_start(self, *_):
        time.sleep(1.0)


def test_14_the_time_of_a_resumed_fit_is_of_all_its_processes(packed, recipe, tmp_path):
    short = patch(recipe, SHORT)
    with pytest.raises(Interrupted):
        fit(short, packed, state_folder=tmp_path, callbacks=[Slow(), SignalAt(30)])
    resumed = fit(short, packed, state_folder=tmp_path, callbacks=[Slow()])
    assert resumed.seconds["fit"] > 2.0
    assert resumed.seconds["fit"] > resumed.seconds["train"]
