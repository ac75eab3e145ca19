"""Training a head on features that were computed once: the same result as without, and computed once."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import backbones
import numpy as np
import pytest
import torch
from training_recipes import SignalAt, same

from cnn_tuning.config import patch
from cnn_tuning.diagnosis.evidence import gather
from cnn_tuning.diagnosis.range_test import range_test
from cnn_tuning.training import features
from cnn_tuning.training.features import FOLDER
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted
from cnn_tuning.training.start import say_once

HEAD = {"trainer.finetune.trainable": "head", "model.arguments.units": 16, "model.dropout": "both"}
# Convolutions over batches of other sizes add in another order.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say_once.cache_clear()
    return tmp_path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return backbones.pictures(tmp_path_factory.mktemp("colours"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer.ema_decay": 0.9, "trainer.gradient_clip": 1.0},
        {"trainer.data_on_device": "no", "trainer.workers": 0},
    ],
)
def test_the_result_is_the_same_as_without_the_cache(here, data, changes):
    recipe = patch(backbones.pretrained_recipe(here), HEAD | changes)
    kept = fit(recipe, data, state_folder=here / "a")
    anew = fit(patch(recipe, {"trainer.finetune.cache_features": "no"}), data, state_folder=here / "b")
    for (name, one), (_, other) in zip(
        kept.network.state_dict().items(), anew.network.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE, msg=name)
    images = torch.from_numpy(np.array(data.split("val").images))
    with torch.no_grad():
        torch.testing.assert_close(kept.network(images), anew.network(images), **TOLERANCE)
    assert [row["val/accuracy"] for row in kept.history] == [row["val/accuracy"] for row in anew.history]
    assert kept.specification == anew.specification
    assert kept.layers == anew.layers
    assert kept.best["val/accuracy"] > 0.6


def test_features_are_computed_once_for_all_heads_and_anew_for_other_weights(here, data, capsys):
    recipe = patch(backbones.pretrained_recipe(here), HEAD | {"trainer.max_epochs": 1})
    for units in (8, 16):
        fit(patch(recipe, {"model.arguments.units": units, "seed": units}), data, state_folder=here / "s")
    told = capsys.readouterr().err
    assert told.count("features of 144 pictures") == 1
    assert told.count("learnt from pictures resized by bicubic, these are by bilinear") == 1
    assert len(list(FOLDER.glob("*/train.npy"))) == 1
    scratch = patch(recipe, {"model.pretrained": False})
    for seed in (0, 1):
        fit(patch(scratch, {"seed": seed}), data, state_folder=here / "s")
    assert len(list(FOLDER.glob("*/train.npy"))) == 3
    told = capsys.readouterr().err
    assert "the frozen backbone is not pretrained" in told
    assert not list(FOLDER.glob("*.partial"))


def test_augmentation_trains_without_the_cache_and_says_so(here, data, capsys):
    augmented = patch(backbones.pretrained_recipe(here), HEAD | {"augment.flip": True})
    fit(augmented, data, state_folder=here / "a")
    assert "computed anew" in capsys.readouterr().err
    assert not FOLDER.exists()


def test_an_interrupted_head_goes_on_to_the_same_bits(here, data):
    recipe = patch(backbones.pretrained_recipe(here), HEAD)
    whole = fit(recipe, data, state_folder=here / "whole")
    with pytest.raises(Interrupted):
        fit(recipe, data, state_folder=here / "cut", callbacks=[SignalAt(8)])
    assert same(fit(recipe, data, state_folder=here / "cut").network, whole.network)


def _fit_apart(folder: str, data_folder: str, units: int) -> None:
    import os

    from cnn_tuning.data.packed import PackedData

    os.chdir(folder)
    recipe = patch(backbones.recipe_of(), HEAD | {"trainer.max_epochs": 1, "model.arguments.units": units})
    fit(recipe, PackedData.open(Path(data_folder)), state_folder=Path(f"s{units}"))


@pytest.mark.slow
def test_processes_side_by_side_compute_them_once(here, data, capfd):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fit_apart, args=(str(here), str(data.path), n)) for n in (4, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert capfd.readouterr().err.count("features of 144 pictures") == 1


def test_an_interrupted_computation_goes_on_where_it_was(here, data, monkeypatch):
    recipe = patch(backbones.recipe_of(), HEAD | {"trainer.max_epochs": 1})
    whole = fit(recipe, data, state_folder=here / "a")
    (kept,) = FOLDER.glob("*[0-9a-f]/")
    kept.rename(here / "whole")
    whole.state.remove()
    real, calls = features._forward, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(features, "NOTED_EVERY_S", 0.0)
    monkeypatch.setattr(features, "_forward", counted)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, data, state_folder=here / "a")
    assert same(fit(recipe, data, state_folder=here / "a").network, whole.network)
    assert len(calls) == 4  # 96 and 48 pictures are three batches, of which two were kept
    for name in ("train.npy", "val.npy"):
        assert (kept / name).read_bytes() == (here / "whole" / name).read_bytes()
    assert sorted(file.name for file in kept.iterdir()) == ["train.npy", "val.npy"]


def test_what_was_left_half_done_is_done_again(here, data, capsys):
    recipe = patch(backbones.recipe_of(), HEAD | {"trainer.max_epochs": 1})
    fitted = fit(recipe, data, state_folder=here / "a")
    (kept,) = FOLDER.glob("*[0-9a-f]/")
    shutil.move(kept, kept.with_suffix(".partial"))
    (kept.with_suffix(".partial") / "val.npy").write_bytes(b"cut")
    fitted.state.remove()
    again = fit(replace(recipe), data, state_folder=here / "a")
    assert same(again.network, fitted.network)
    assert capsys.readouterr().err.count("features of 144 pictures") == 2


def test_a_diagnosis_of_a_cached_training_asks_the_head_alone(here, data):
    recipe = patch(backbones.pretrained_recipe(here), HEAD | {"trainer.max_epochs": 1})
    fitted = fit(recipe, data, state_folder=here / "a")
    whole = gather(fitted.network, data, recipe, torch.device("cpu"))
    head = gather(fitted.network, data, recipe, torch.device("cpu"), fitted.features)
    np.testing.assert_allclose(head.probabilities, whole.probabilities, atol=1e-4)
    assert np.array_equal(head.input_mean, whole.input_mean)


def test_a_range_test_begins_with_the_pretrained_weights_and_moves_the_head_alone(here, data):
    recipe = patch(backbones.pretrained_recipe(here), HEAD)
    pretrained, scratch = (
        range_test(changed, data, steps=5, lowest=1e-7, highest=1e-6)
        for changed in (recipe, patch(recipe, {"model.pretrained": False}))
    )
    assert len(pretrained.loss) == 5
    assert not np.allclose(pretrained.loss, scratch.loss)
