"""fit(): learns, repeats itself to the bit, goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from training_recipes import SHORT, SignalAt, recipe_with, same

from cnn_tuning.config import patch
from cnn_tuning.errors import UserError
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted


def test_learns_the_digits(packed, recipe, tmp_path):
    seen = []
    fitted = fit(recipe, packed, state_folder=tmp_path, log=lambda metrics, step: seen.append((step, metrics)))
    assert fitted.best["val/accuracy"] > 0.97
    assert fitted.history[0]["val/loss"] > fitted.history[-1]["val/loss"]
    assert [step for step, _ in seen] == [row["step"] for row in fitted.history]
    assert "val/accuracy" in seen[0][1]
    assert "train/learning_rate" in seen[0][1]
    # Results that could not be written cost nothing: the same call gives them again without training.
    again = fit(recipe, packed, state_folder=tmp_path)
    assert again.resumed_from == fitted.history[-1]["step"]
    assert again.history == fitted.history
    assert same(again.network, fitted.network)
    again.state.remove()
    assert not any(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(packed, recipe, tmp_path):
    short = patch(recipe, SHORT)
    one, two = (fit(short, packed, state_folder=tmp_path / name) for name in "ab")
    assert one.history == two.history
    assert same(one.network, two.network)
    other = fit(patch(short, {"seed": 1}), packed, state_folder=tmp_path / "c")
    assert not same(one.network, other.network)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "step", "plateau"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_and_schedule_learns_and_resumes(tmp_path, packed, schedule, optimizer):
    rate = 0.05 if optimizer == "sgd" else 0.003
    chosen = recipe_with([f"schedule={schedule}", f"optimizer={optimizer}", f"optimizer.learning_rate={rate}"])
    whole = fit(chosen, packed, state_folder=tmp_path / "whole")
    assert whole.history[-1]["train/loss"] < 1.5
    with pytest.raises(Interrupted):
        fit(chosen, packed, state_folder=tmp_path / "cut", callbacks=[SignalAt(30)])
    assert same(fit(chosen, packed, state_folder=tmp_path / "cut").network, whole.network)


def test_a_second_signal_stops_at_once(packed, recipe, tmp_path):
    class Stuck(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(5)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(patch(recipe, SHORT), packed, state_folder=tmp_path, callbacks=[Stuck()])
    assert signal.getsignal(signal.SIGINT) is before


def test_early_stopping_ends_before_the_last_epoch(packed, recipe, tmp_path):
    patient = patch(recipe, {"trainer.early_stopping": {"patience": 1, "min_delta": 0.5}})
    assert len(fit(patient, packed, state_folder=tmp_path).history) == 2


def test_mixed_precision_clipping_and_memory_formats_train(packed, recipe, tmp_path):
    changed = patch(
        recipe,
        SHORT | {"trainer.precision": "bf16", "trainer.gradient_clip": 1.0, "trainer.channels_last": False},
    )
    assert fit(changed, packed, state_folder=tmp_path).best["val/accuracy"] > 0.5


def test_a_split_read_through_the_memory_map_gives_the_same_weights(packed, recipe, tmp_path):
    short = patch(recipe, SHORT)
    here = fit(short, packed, state_folder=tmp_path / "a")
    mapped = fit(patch(short, {"trainer.data_on_device": "no"}), packed, state_folder=tmp_path / "b")
    assert here.history == mapped.history
    assert same(here.network, mapped.network)


def test_a_network_too_deep_for_the_pictures_is_said(packed, recipe, tmp_path):
    deep = patch(recipe, {"model.architecture": "resnet9", "model.arguments": {}})
    with pytest.raises(UserError, match="does not fit pictures of"):
        fit(deep, packed, state_folder=tmp_path)
    with pytest.raises(UserError, match="did you mean 'lab_cnn'"):
        fit(patch(recipe, {"model.architecture": "lab_cn"}), packed, state_folder=tmp_path)


@pytest.mark.slow
def test_a_compiled_network_learns_and_repeats_itself(packed, recipe, tmp_path):
    compiled = patch(recipe, SHORT | {"trainer.compile": True, "trainer.max_epochs": 1})
    one, two = (fit(compiled, packed, state_folder=tmp_path / name) for name in "ab")
    assert one.best["val/accuracy"] > 0.5
    assert same(one.network, two.network)


def test_half_precision_on_a_cpu_is_refused(packed, recipe, tmp_path):
    with pytest.raises(UserError, match="needs a GPU"):
        fit(
            patch(recipe, {"trainer.precision": "16", "trainer.accelerator": "cpu"}), packed, state_folder=tmp_path
        )


def test_data_read_by_workers_that_are_started_afresh_is_mapped_not_sent(packed):
    import pickle

    import numpy as np

    from cnn_tuning.data.batches import _Rows

    split = packed.split("train")
    assert isinstance(split.images, np.memmap)
    rows = _Rows(split, [np.arange(5)])
    sent = pickle.dumps(rows)
    assert len(sent) < split.images.nbytes
    assert torch.equal(pickle.loads(sent)[0][0], rows[0][0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(packed, recipe, tmp_path):
    with pytest.raises(UserError, match="torch sees none"):
        fit(patch(recipe, {"trainer.accelerator": "gpu"}), packed, state_folder=tmp_path)
