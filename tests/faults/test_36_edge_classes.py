"""Row 36: a class of one image, an empty one, one class only, a split larger than the data: clear errors."""

import numpy as np
import pytest
from PIL import Image

from cnn_tuning.config import DataConfig, FileConfig, ImageConfig
from cnn_tuning.data.prepare import prepare
from cnn_tuning.errors import UserError


def folder(root, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def configured(**changes):
    values = {"name": "m", "format": "image_folder", "files": {}, "sources": (), "image": ImageConfig((8, 8), 1)}
    return DataConfig(**(values | changes))


def refused(tmp_path, message, **changes):
    with pytest.raises(UserError, match=message) as caught:
        prepare(configured(**changes), tmp_path / "raw", tmp_path / "out", seed=0)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_too_small_for_every_split(tmp_path, count):
    folder(tmp_path / "raw", {"cat": 20, "dog": 20, "newt": count})
    refused(tmp_path, rf"too few images for one each in train, test, val: 'newt' \({count}\)")


def test_three_images_are_one_for_each_split(tmp_path):
    folder(tmp_path / "raw", {"cat": 20, "dog": 20, "newt": 3})
    meta = prepare(configured(), tmp_path / "raw", tmp_path / "out", seed=0)
    assert [counts[2] for counts in meta.counts.values()] == [1, 1, 1]


def test_an_empty_class_folder(tmp_path):
    folder(tmp_path / "raw", {"cat": 20, "dog": 20, "newt": 0})
    refused(tmp_path, "no training image in newt: add images, or take the name out of data.classes")


def test_a_class_of_the_configuration_without_images(tmp_path):
    folder(tmp_path / "raw", {"cat": 20, "dog": 20})
    refused(tmp_path, "no training image in newt", classes=("cat", "dog", "newt"))


def test_a_class_that_only_the_test_split_has(tmp_path):
    folder(tmp_path / "raw" / "train", {"cat": 20, "dog": 20})
    folder(tmp_path / "raw" / "test", {"cat": 5, "newt": 5})
    refused(tmp_path, "no training image in newt")


def test_one_class_only(tmp_path):
    folder(tmp_path / "raw", {"cat": 20})
    refused(tmp_path, r"the data has 1 class \('cat'\): classification needs at least 2")


def test_no_images_at_all(tmp_path):
    folder(tmp_path / "raw", {"cat": 0, "dog": 0})
    refused(tmp_path, "no training image in cat, dog")


@pytest.mark.parametrize("val_samples", [40, 1000])
def test_a_validation_split_larger_than_the_data(tmp_path, val_samples):
    for split in ("train", "test"):
        folder(tmp_path / "raw" / split, {"cat": 20, "dog": 20})
    message = f"data.val_samples would hold out {val_samples} of 40 training images: make it smaller"
    refused(tmp_path, message, val_samples=val_samples)


def test_a_validation_split_that_would_empty_a_class(tmp_path):
    for split in ("train", "test"):
        folder(tmp_path / "raw" / split, {"cat": 20, "dog": 20})
    refused(tmp_path, "data.val_samples: 39 images of 40 leave none of some class", val_samples=39)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"val_samples": 2}, "data.val_samples"), ({"val_fraction": 0.0}, "data.val_fraction"),
     ({"test_fraction": 0.01}, "data.test_fraction"), ({"limit": 2}, "data.limit")],
)  # fmt: skip
def test_a_split_too_small_for_the_classes(tmp_path, changes, key):
    folder(tmp_path / "raw", {"cat": 20, "dog": 20, "newt": 20})
    refused(tmp_path, rf"{key}.*: \d images are too few for 3 classes", **changes)


def test_bad_images_that_empty_a_class_are_told_as_such(tmp_path):
    folder(tmp_path / "raw", {"cat": 20, "dog": 20})
    for path in (tmp_path / "raw" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"nothing left in dog without 20 bad images:\n  dog/0.png: zero bytes"):
        prepare(configured(), tmp_path / "raw", tmp_path / "out", seed=0)


def test_the_same_holds_for_arrays(tmp_path):
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw" / "a.npz", x=np.zeros((30, 8, 8), np.uint8), y=np.arange(30) % 2 * 2)
    refused(tmp_path, "no training image in 1", format="npz", files={"a.npz": FileConfig()})
