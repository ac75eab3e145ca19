"""Any picture to the network's input."""

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_tuning.config import ImageConfig
from cnn_tuning.data.images import BadImage, opened, to_input

GREY = ImageConfig((28, 28), 1)
COLOUR = ImageConfig((16, 24), 3)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def half(width=40, height=20, left=(255, 0, 0), right=(0, 0, 255), mode="RGB"):
    """A picture whose left half differs from its right half."""
    image = Image.new(mode, (width, height), left)
    image.paste(Image.new(mode, (width - width // 2, height), right), (width // 2, 0))
    return image


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_right_size_passes_bit_for_bit(format):
    pixels = noise(28, 28)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), format, **options)
    assert np.array_equal(to_input(data, GREY), pixels[None])


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_arrays_and_images_of_right_size_pass_unchanged(resize, interpolation):
    grey = ImageConfig((28, 28), 1, resize, interpolation)
    colour = ImageConfig((16, 24), 3, resize, interpolation)
    a, b = noise(28, 28), noise(16, 24, 3)
    for form in (a, a[:, :, None], Image.fromarray(a), a.astype(np.int64), a / 255):
        assert np.array_equal(to_input(form, grey), a[None])
    for form in (b, Image.fromarray(b), encoded(Image.fromarray(b), "PNG")):
        assert np.array_equal(to_input(form, colour), b.transpose(2, 0, 1))


def test_array_equals_its_png():
    array = noise(50, 70, 3)
    assert np.array_equal(to_input(array, GREY), to_input(encoded(Image.fromarray(array), "PNG"), GREY))


def test_resize_stretch_crop_pad():
    image = half()  # 40 × 20, red and blue
    whole = to_input(image, ImageConfig((10, 10), 3, "stretch", "nearest"))
    assert whole.shape == (3, 10, 10) and (whole[0, :, :5] == 255).all() and (whole[2, :, 5:] == 255).all()
    middle = Image.new("RGB", (40, 20), (9, 9, 9))
    middle.paste((200, 100, 50), (10, 0, 30, 20))
    cropped = to_input(middle, ImageConfig((10, 10), 3, "crop"))[:, :, 1:-1]  # its edges blend with what was cut
    assert (cropped == np.array([200, 100, 50])[:, None, None]).all()
    padded = to_input(image, ImageConfig((20, 20), 3, "pad", background=7))
    assert (padded[:, :5] == 7).all() and (padded[:, 15:] == 7).all() and padded[0, 10, 2] == 255


def test_pad_keeps_a_line_of_an_extreme_shape():
    assert to_input(np.full((1, 3000), 255, np.uint8), ImageConfig((8, 8), 1, "pad")).max() == 255


MODES = {
    "1": (Image.new("1", (40, 20), 1), 255),
    "L": (Image.new("L", (40, 20), 200), 200),
    "P": (Image.new("RGB", (40, 20), (200, 200, 200)).convert("P", palette=Image.Palette.ADAPTIVE), 200),
    "RGB": (Image.new("RGB", (40, 20), (200, 200, 200)), 200),
    "LA": (Image.new("LA", (40, 20), (200, 255)), 200),
    "RGBA": (Image.new("RGBA", (40, 20), (200, 200, 200, 255)), 200),
    "PA": (Image.new("LA", (40, 20), (200, 255)).convert("PA"), 200),
    "RGBa": (Image.new("RGBA", (40, 20), (200, 200, 200, 255)).convert("RGBa"), 200),
    "CMYK": (Image.new("CMYK", (40, 20), (0, 0, 0, 55)), 200),
    "YCbCr": (Image.new("YCbCr", (40, 20), (200, 128, 128)), 200),
    "LAB": (Image.new("LAB", (40, 20), (255, 128, 128)), 255),
    "HSV": (Image.new("HSV", (40, 20), (0, 0, 200)), 200),
    "I;16": (Image.fromarray(np.full((20, 40), 200 * 257, np.uint16)), 200),
    "I": (Image.fromarray(np.full((20, 40), 200 * 257, np.int32)), 200),
    "I of 8 bits": (Image.new("L", (40, 20), 200).convert("I"), 200),
    "F": (Image.fromarray(np.full((20, 40), 200 / 255, np.float32)), 200),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_mode_is_converted(mode, config):
    image, expected = MODES[mode]
    before = image.mode
    pixels = to_input(image, config)
    assert image.mode == before
    assert pixels.dtype == np.uint8 and pixels.shape == (config.channels, *config.size)
    assert np.abs(pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("background", [0, 90, 255])
def test_transparency_lies_over_the_background(background):
    config = ImageConfig((8, 8), 3, background=background)
    clear = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    assert (to_input(encoded(clear, "PNG"), config) == background).all()
    palette = Image.new("P", (8, 8), 0)
    assert (to_input(encoded(palette, "PNG", transparency=0), config) == background).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    """Each stored form of an upright picture (red above, blue below left, green below right) reads upright."""
    upright = Image.new("RGB", (64, 64), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 32, 32, 64))
    upright.paste((0, 255, 0), (32, 32, 64, 64))
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(to_stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = to_input(encoded(stored, format, exif=exif), ImageConfig((16, 16), 3)).astype(int)
    for row, column, colour in (
        (4, 4, (255, 0, 0)),
        (4, 12, (255, 0, 0)),
        (12, 4, (0, 0, 255)),
        (12, 12, (0, 255, 0)),
    ):
        assert np.abs(pixels[:, row, column] - colour).max() < 60


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_counts(format):
    frames = [Image.new("RGB", (16, 24), c) for c in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    pixels = to_input(data, ImageConfig((24, 16), 3))
    assert pixels[0].min() >= 245 and pixels[1].max() <= 5


def test_a_large_jpeg_looks_like_its_full_decoding():
    smooth = Image.fromarray(noise(12, 16, 3)).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(data))
    full.load()
    config = ImageConfig((32, 32), 3)
    assert np.abs(to_input(data, config).astype(int) - to_input(full, config)).mean() < 3


BAD = {
    "zero bytes": b"",
    "text": b"not an image at all",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "NaN": np.full((4, 4), np.nan),
    "infinite": np.full((4, 4), np.inf),
    "over one": np.full((4, 4), 1.5),
    "under zero": np.full((4, 4), -0.1),
    "integers over 255": np.full((4, 4), 256),
    "complex": np.zeros((4, 4), complex),
    "text array": np.array([["a"]]),
    "objects": np.array([[None]]),
    "one axis": np.zeros(4, np.uint8),
    "five channels": np.zeros((4, 4, 5), np.uint8),
    "no pixels": np.zeros((0, 4), np.uint8),
    "mode I over 16 bit": Image.fromarray(np.full((4, 4), 70_000, np.int32)),
    "mode F with NaN": Image.fromarray(np.full((4, 4), np.nan, np.float32)),
    "none": None,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name):
    with pytest.raises(BadImage) as caught:
        to_input(BAD[name], GREY)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_half_a_file_is_refused(format):
    data = encoded(Image.fromarray(noise(64, 64, 3)), format)
    with pytest.raises(BadImage):
        to_input(data[: len(data) // 2], GREY)


WHOLE = {f: encoded(Image.fromarray(noise(20, 20, 3)), f) for f in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_bytes_give_an_input_or_bad_image(format, data):
    whole = bytearray(WHOLE[format])
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        pixels = to_input(bytes(whole[:cut]), GREY)
    except BadImage:
        return
    assert pixels.shape == (1, 28, 28) and pixels.dtype == np.uint8


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.sampled_from(["stretch", "crop", "pad"]))
def test_any_size_becomes_the_size(height, width, channels, resize):
    config = ImageConfig((9, 13), 3, resize)
    assert to_input(noise(height, width, channels), config).shape == (3, 9, 13)


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(BadImage, match="more than the limit of 399"):
        to_input(encoded(Image.fromarray(noise(20, 20)), "PNG"), GREY, max_pixels=399)
    with pytest.raises(BadImage, match="limit"):
        to_input(noise(20, 20), GREY, max_pixels=399)


DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


@pytest.mark.parametrize("mode", DEEP)
@given(st.data())
def test_deep_grey_is_scaled_as_by_one_formula(mode, data):
    """Whatever the pieces it is worked in: every value times 255/white, rounded, as doubles have it."""
    most = data.draw(st.sampled_from([1, 200, 255, 256, 65535]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = (rng.random((data.draw(st.integers(1, 3)), 200_000)) * most).astype(DEEP[mode])
    values[0, 0] = most
    image = Image.fromarray(values)
    assert image.mode == mode
    white = 65535 if mode == "I;16" or most > 255 else 1 if mode == "F" and most <= 1 else 255
    expected = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    config = ImageConfig(values.shape, 1)
    assert np.array_equal(to_input(image, config)[0], expected)
    assert np.array_equal(to_input(expected / 255, config)[0], expected), "and floats of 0 to 1 likewise"


@pytest.mark.parametrize("mode", DEEP)
def test_deep_grey_takes_little_memory(mode):
    image = Image.fromarray(np.full((2000, 2000), 200, DEEP[mode]))
    tracemalloc.start()
    to_input(image, GREY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 4_000_000, "bytes for a pixel, of what numpy takes"


def test_opened_knows_the_size_and_decodes_nothing():
    data = encoded(Image.fromarray(noise(30, 20)), "PNG")
    damaged = data[:60] + bytes([data[60] ^ 255]) + data[61:]
    assert opened(damaged).size == (20, 30)
    with pytest.raises(BadImage, match="cannot be decoded"):
        to_input(opened(damaged), GREY)
    for form in (data, noise(30, 20), Image.fromarray(noise(30, 20))):
        assert opened(form).size == (20, 30)
        assert np.array_equal(to_input(opened(form), GREY), to_input(form, GREY))
        with pytest.raises(BadImage, match="more than the limit of 599"):
            opened(form, max_pixels=599)
