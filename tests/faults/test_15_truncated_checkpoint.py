"""Row 15: a checkpoint cut anywhere is named, and the one before it is used."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_recipes import SHORT, SignalAt, recipe_with

from cnn_tuning.config import patch
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted, State


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    state = State(tmp_path_factory.mktemp("state"), recipe_with([]), "data")
    state.open()
    for step in (1, 2, 3):
        state.write({"global_step": step, "weights": torch.arange(500.0)}, step)
    return state


def test_15_the_last_two_are_kept_and_the_newest_is_used(written):
    assert sorted(p.name for p in written.path.glob("*.ckpt")) == ["step-00000002.ckpt", "step-00000003.ckpt"]
    assert written.newest().name == "step-00000003.ckpt"
    assert not list(written.path.glob("*.partial"))


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 0.9999))
def test_15_a_file_cut_at_any_offset_falls_back(written, share):
    newest = written.path / "step-00000003.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(share * len(whole))])
    try:
        assert newest.stat().st_size < len(whole)
        assert written.newest().name == "step-00000002.ckpt"
    finally:
        newest.write_bytes(whole)


DAMAGES = {
    "empty": lambda whole: whole[:0],
    "first byte": lambda whole: whole[:1],
    "without the last byte": lambda whole: whole[:-1],
    "one bit": lambda whole: whole[:99] + bytes([whole[99] ^ 1]) + whole[100:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_15_the_damaged_file_is_named(written, capfd, damage):
    newest = written.path / "step-00000003.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(damage(whole))
    try:
        assert written.newest().name == "step-00000002.ckpt"
    finally:
        newest.write_bytes(whole)
    assert f"{newest} is damaged" in capfd.readouterr().err


def test_15_a_fit_goes_on_from_the_one_before(packed, recipe, tmp_path, capfd):
    often = patch(recipe, SHORT | {"trainer.checkpoint_every_s": 1e-6})
    with pytest.raises(Interrupted) as stopped:
        fit(often, packed, state_folder=tmp_path, callbacks=[SignalAt(10)])
    newest = stopped.value.saved
    assert newest.name == "step-00000010.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert fit(often, packed, state_folder=tmp_path).resumed_from == 9
    assert f"{newest} is damaged" in capfd.readouterr().err


def test_15_a_cut_manifest_means_a_start_from_the_beginning(written):
    manifest = written.path / "checkpoints.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2])
    try:
        with pytest.raises(json.JSONDecodeError):
            json.loads(manifest.read_text())
        assert written.newest() is None
    finally:
        manifest.write_text(whole)
