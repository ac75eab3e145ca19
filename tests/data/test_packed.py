"""Prepared folders: opened split by split, refused when damaged."""

import numpy as np
import pytest

from cnn_tuning.config import DataConfig, FileConfig, ImageConfig
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.errors import UserError


@pytest.fixture
def packed(tmp_path):
    (tmp_path / "raw").mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "raw" / "a.npz", x=images, y=np.arange(200) % 4)
    config = DataConfig("made", "npz", {"a.npz": FileConfig()}, (), ImageConfig((6, 6), 1))
    prepare(config, tmp_path / "raw", tmp_path / "out", seed=0)
    return tmp_path / "out"


def test_opening_one_split_needs_no_other(packed):
    for name in ("test", "val"):
        for file in (packed / name).iterdir():
            file.unlink()
        (packed / name).rmdir()
    data = PackedData.open(packed)
    assert len(data.split("train")) == 144 and isinstance(data.split("train").images, np.memmap)
    with pytest.raises(UserError, match=r"test/images.npy is missing: run `dvc repro -f preprocess`"):
        data.split("test")


def test_a_missing_folder_and_an_unknown_split(tmp_path, packed):
    with pytest.raises(UserError, match="run `dvc repro preprocess` first"):
        PackedData.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no split 'tset'; one of train, val, test"):
        PackedData.open(packed).split("tset")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1}', "null", "\x00"])
def test_a_damaged_meta_is_one_line(packed, text):
    (packed / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta.json is damaged") as caught:
        PackedData.open(packed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("keep", [0, 5, 60, 127, 128, 500, -1])
def test_a_truncated_array_is_one_line(packed, file, keep):
    path = packed / "train" / file
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(UserError, match=rf"{file} is damaged") as caught:
        PackedData.open(packed).split("train")
    assert "\n" not in str(caught.value)


def test_another_count_or_type_is_refused(packed):
    np.save(packed / "val" / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(UserError, match=r"holds int64 \(3,\), meta.json says int64 \(16,\)"):
        PackedData.open(packed).split("val")


def test_verify_notices_one_changed_byte(packed):
    path = packed / "test" / "images.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    PackedData.open(packed).verify("train")
    with pytest.raises(UserError, match=r"differs from meta\.json"):
        PackedData.open(packed).verify("test")
