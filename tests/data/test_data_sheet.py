"""Pictures of prepared data are written and show something."""

import numpy as np
import pytest
from PIL import Image

from cnn_tuning.config import DataConfig, FileConfig, ImageConfig
from cnn_tuning.data.packed import Meta, PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.reports.data_sheet import class_distribution, image_grid, sheet


@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (30, 3), (150, 1)])
def test_pictures(tmp_path, classes, channels):
    (tmp_path / "raw").mkdir()
    count = classes * 5
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
    np.savez(tmp_path / "raw" / "a.npz", x=images, y=np.arange(count) % classes)
    names = tuple(f"a class with a long name, number {i}" for i in range(classes))
    config = DataConfig(
        "made", "npz", {"a.npz": FileConfig()}, (), ImageConfig((8, 8), channels), names, val_fraction=0.25
    )
    meta = prepare(config, tmp_path / "raw", tmp_path / "out", seed=0)
    class_distribution(meta, tmp_path / "sheet" / "classes.png")
    image_grid(PackedData.open(tmp_path / "out"), tmp_path / "sheet" / "images.png", seed=0)
    for name in ("classes", "images"):
        pixels = np.asarray(Image.open(tmp_path / "sheet" / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 100 and pixels.std() > 10


@pytest.mark.parametrize("classes", [3, 30])
def test_names_are_shown_as_they_are(tmp_path, classes):
    """To matplotlib a pair of dollars is a formula, and a wrong one an error."""
    (tmp_path / "raw").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (classes * 5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "raw" / "a.npz", x=images, y=np.arange(classes * 5) % classes)
    names = tuple(f"${i} \\frac $" for i in range(classes))
    image = ImageConfig((8, 8), 1)
    config = DataConfig("$\\x$", "npz", {"a.npz": FileConfig()}, (), image, names, val_fraction=0.25)
    meta = prepare(config, tmp_path / "raw", tmp_path / "out", seed=0)
    class_distribution(meta, tmp_path / "classes.png")
    image_grid(PackedData.open(tmp_path / "out"), tmp_path / "images.png", seed=0)
    assert (tmp_path / "classes.png").stat().st_size > 1000 < (tmp_path / "images.png").stat().st_size


def test_the_text_lists_classes_by_size():
    names = tuple(f"{i:03}.breed|{i}" for i in range(133))
    train = tuple(30 + (7 * i) % 40 for i in range(133))
    counts = {"train": train, "val": (4,) * 133, "test": (5,) * 133}
    meta = Meta("dogs", names, ImageConfig((240, 240), 3), counts, (0.5,) * 3, (0.2,) * 3, 1, 0, {}, {})
    text = sheet(meta, 3)
    assert "240×240×3 = 172,800 values" in text and "133 classes; 3 bad images" in text
    rows = [line.split(" | ") for line in text.splitlines() if "breed" in line]
    shown = [int(row[2]) for row in rows]
    assert len(rows) == 133 and shown == sorted(train, reverse=True) and rows[0][3:] == ["4", "5 |"]
    assert "stand-in" not in text and "stand-in" in sheet(meta, 0, stand_in=True)
