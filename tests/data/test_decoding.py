"""The fast ways of `to_input` give what Pillow gives: JPEGs bit for bit, resampled pixels within 2 grey levels."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_tuning.config import ImageConfig
from cnn_tuning.data.images import BadImage, to_input


def picture(width, height, mode="RGB", seed=0):
    """Something between noise and a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


KINDS = st.fixed_dictionaries(
    {
        "quality": st.integers(20, 100),
        "subsampling": st.sampled_from([0, 1, 2]),
        "progressive": st.booleans(),
        "optimize": st.booleans(),
    }
)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(8, 300), st.integers(8, 300)),
    st.sampled_from(["RGB", "L"]),
    KINDS,
    st.integers(1, 8),
    st.sampled_from(
        [ImageConfig((16, 24), 3), ImageConfig((40, 40), 1, "pad"), ImageConfig((9, 9), 3, "stretch", "nearest")]
    ),
)
def test_jpeg_bytes_give_the_pixels_that_pillow_decodes(size, mode, options, orientation, config):
    """An opened picture is decoded by Pillow, at whatever fraction of its size, and turned by it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(*size, mode), exif=exif, **options)
    assert np.array_equal(to_input(data, config), to_input(Image.open(io.BytesIO(data)), config))


def test_the_fast_decoder_is_in_use(monkeypatch):
    """Otherwise the test above would compare Pillow with itself."""
    data = jpeg(picture(64, 64))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded by Pillow"))
    assert to_input(data, ImageConfig((64, 64), 3)).shape == (3, 64, 64)


@settings(max_examples=60)
@given(st.data())
def test_damage_is_judged_as_by_pillow(data):
    whole = bytearray(jpeg(picture(48, 40), quality=80))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(2, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    config = ImageConfig((16, 16), 3)

    def outcome(form):
        try:
            return to_input(form(), config).tobytes()
        except (BadImage, OSError):
            return None

    assert outcome(lambda: damaged) == outcome(lambda: Image.open(io.BytesIO(damaged)))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_colour_spaces(mode):
    grey = Image.new("RGB", (40, 40), (120, 120, 120)).convert(mode)
    assert np.abs(to_input(jpeg(grey, quality=100), ImageConfig((16, 16), 3)).astype(int) - 120).max() <= 2
