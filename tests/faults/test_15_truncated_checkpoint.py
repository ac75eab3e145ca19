"""Row 15: a checkpoint cut anywhere is named, and the one before it is used."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_recipes import recipe_with

from cnn_tuning.training.resume import State


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


def test_15_the_damaged_file_is_named(written, capfd):
    newest = written.path / "step-00000003.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    try:
        written.newest()
    finally:
        newest.write_bytes(whole)
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
