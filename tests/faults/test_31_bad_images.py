"""Row 31: bad images are listed with the reason, the policy is applied, convertible ones are converted."""

import csv
import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from cnn_tuning.config import DataConfig, ImageConfig
from cnn_tuning.data.images import to_input
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.errors import UserError

IMAGE = ImageConfig((16, 16), 3)


def config(**changes):
    return DataConfig(
        **({"name": "m", "format": "image_folder", "files": {}, "sources": (), "image": IMAGE} | changes)
    )


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed, size=24, channels=3):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8))


def bad_files():
    png, jpeg = encoded(noise(1), "PNG"), encoded(noise(2), "JPEG", quality=95)
    return {
        "cut.png": (png[: len(png) // 2], "cannot be decoded"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header_only.png": (png[:40], "cannot be decoded|known format"),
        "empty.png": (b"", "zero bytes"),
        "text.jpg": (b"<html>404 not found</html>", "not an image"),
        "notes.txt": (b"some notes", "not an image"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        "zeros.png": (bytes(1000), "not an image"),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "cannot be decoded"),
    }


def convertible_files():
    """Files that look odd but are pictures: each with the colour that must come out, or None."""
    red, mid = (200, 0, 0), 120
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.new("RGB", (20, 20), red)
    rotated.paste((0, 0, 200), (0, 0, 10, 20))
    frames = [Image.new("RGB", (20, 20), c) for c in (red, (0, 200, 0))]
    return {
        "cmyk.jpg": (encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 55)), "JPEG", quality=100), red),
        "deep.png": (encoded(Image.fromarray(np.full((20, 20), mid * 257, np.uint16)), "PNG"), (mid,) * 3),
        "alpha.png": (encoded(Image.new("RGBA", (20, 20), (200, 0, 0, 255)), "PNG"), red),
        "clear.png": (encoded(Image.new("RGBA", (20, 20), (200, 0, 0, 0)), "PNG"), (0, 0, 0)),
        "grey_alpha.png": (encoded(Image.new("LA", (20, 20), (mid, 255)), "PNG"), (mid,) * 3),
        "palette.gif": (encoded(Image.new("RGB", (20, 20), red).quantize(4), "GIF"), red),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), red),
        "one_bit.png": (encoded(Image.new("1", (20, 20), 1), "PNG"), (255,) * 3),
        "a_png.jpg": (encoded(Image.new("RGB", (20, 20), red), "PNG"), red),
        "no_suffix": (encoded(Image.new("RGB", (20, 20), red), "BMP"), red),
        "rotated.jpg": (encoded(rotated, "JPEG", quality=100, exif=exif), None),
    }


@pytest.fixture
def raw(tmp_path):
    """Two classes of good pictures; class `odd` also holds every bad and every convertible file."""
    for label in ("good", "odd"):
        (tmp_path / "raw" / label).mkdir(parents=True)
        for i in range(30):
            noise(100 + i).save(tmp_path / "raw" / label / f"{i:02}.png")
    for name, (data, _) in (bad_files() | convertible_files()).items():
        (tmp_path / "raw" / "odd" / name).write_bytes(data)
    return tmp_path / "raw"


def test_the_made_files_are_bad_or_odd():
    for name, (data, _) in bad_files().items():
        with pytest.raises((OSError, UnidentifiedImageError, SyntaxError)):
            Image.open(io.BytesIO(data)).load()
            if name.endswith(".eps"):
                raise OSError("another program decodes it")
    modes = {name: Image.open(io.BytesIO(data)).mode for name, (data, _) in convertible_files().items()}
    assert modes["cmyk.jpg"] == "CMYK" and modes["deep.png"].startswith("I") and modes["alpha.png"] == "RGBA"
    assert Image.open(io.BytesIO(convertible_files()["animated.gif"][0])).n_frames == 2


def test_drop_lists_each_by_path_with_its_reason_and_goes_on(raw, tmp_path):
    import re

    meta = prepare(config(), raw, tmp_path / "out", seed=0)
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(rejected) == {f"odd/{name}" for name in bad_files()}
    for name, (_, reason) in bad_files().items():
        assert re.search(reason, rejected[f"odd/{name}"]), (name, rejected[f"odd/{name}"])
    assert sum(map(sum, meta.counts.values())) == 60 + len(convertible_files())
    assert len(PackedData.open(tmp_path / "out").split("train")) == sum(meta.counts["train"])


def test_fail_is_one_error_and_a_list_of_them_all(raw, tmp_path):
    for number in range(60):  # more than a terminal is told
        (raw / "good" / f"bad {number}.png").write_bytes(b"")
    (tmp_path / "results").mkdir()
    refused = tmp_path / "results/rejected.csv"
    with pytest.raises(UserError) as caught:
        prepare(config(bad_images="fail"), raw, tmp_path / "out", seed=0, refused=refused)
    text = str(caught.value)
    assert f"{60 + len(bad_files())} bad images" in text and "data.bad_images" in text
    assert f"and {10 + len(bad_files())} more" in text
    assert text.endswith(f"{refused} has the whole list")
    listed = [row["path"] for row in csv.DictReader(refused.open(newline=""))]
    assert set(listed) == {f"odd/{name}" for name in bad_files()} | {f"good/bad {n}.png" for n in range(60)}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", convertible_files())
def test_convertible_pictures_are_converted(name):
    data, colour = convertible_files()[name]
    pixels = to_input(data, IMAGE).astype(int)
    if colour:
        assert np.abs(pixels - np.array(colour)[:, None, None]).max() <= 6
    else:  # stored with blue on the left, to be turned clockwise: blue comes out on top
        assert pixels[2, :6].min() > 150 and pixels[0, 10:].min() > 150


def test_when_nothing_good_is_left_it_says_so(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "raw" / label).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "raw" / label / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="nothing left in a, b, train split"):
        prepare(config(), tmp_path / "raw", tmp_path / "out", seed=0)
