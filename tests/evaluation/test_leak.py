"""Test images that were seen in training are counted, and what they flatter is told."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np

from cnn_tuning.evaluation.leak import find_leak


def test_test_images_of_the_training_and_the_validation_split_are_found(packed, tmp_path):
    split = packed.split("test")
    right = np.array(split.labels)
    clean = find_leak(packed, {"baseline": right})
    assert (clean.images, clean.without) == (0, {"baseline": 1.0})
    assert clean.sentence == f"none of {len(right)}"

    shutil.copytree(packed.path, tmp_path / "data")
    images = np.load(tmp_path / "data/test/images.npy")
    images[:3] = packed.split("train").images[[5, 9, 5]]
    images[3] = packed.split("val").images[0]
    np.save(tmp_path / "data/test/images.npy", images)
    wrong = right.copy()
    wrong[4:8] = (wrong[4:8] + 1) % 10  # all mistakes are on images that were not seen
    leaking = find_leak(replace(packed, path=tmp_path / "data"), {"baseline": wrong})
    assert leaking.images == 4
    assert leaking.without["baseline"] == 1 - 4 / (len(right) - 4)
    assert "which flatters; accuracy on the others: baseline" in leaking.sentence


def test_where_no_training_images_are_it_is_told_that_none_were_compared(packed, tmp_path):
    shutil.copytree(packed.path, tmp_path / "data", ignore=shutil.ignore_patterns("train"))
    right = np.array(packed.split("test").labels)
    unknown = find_leak(replace(packed, path=tmp_path / "data"), {"baseline": right})
    assert unknown.sentence == f"not evaluated: no training images in {tmp_path / 'data'}"
    assert not unknown.without
