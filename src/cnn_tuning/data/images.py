"""Any picture (bytes, array, PIL image) comes in; the network's input goes out: uint8 C×H×W.

The one way to the input, in preprocessing, prediction and serving. It is shipped inside the served model, so
it imports nothing but numpy, Pillow, simplejpeg (libjpeg-turbo) and the configuration. `bench/decode.py` has the
figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, ImageOps

from cnn_tuning.config import ImageConfig
from cnn_tuning.errors import UserError

# What Pillow knows by content and decodes itself: no EPS (runs Ghostscript), no loose formats such as TGA.
# Not ICO: Pillow decodes what it holds on opening, before a limit could be checked.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000", "PCX")

Box = tuple[float, float, float, float]

MAX_PIXELS = 50_000_000
_PIECE = 1 << 18

# With glibc, a third of a picture's time goes into memory that is given back and taken again page by page, until a
# large block was freed once (mallopt(3), "dynamic mmap threshold").
_block = np.empty(16 << 20, np.uint8)
del _block


class BadImage(UserError):
    """A picture that cannot become an input; the text is a short reason."""


def to_input(
    image: bytes | np.ndarray | Image.Image, config: ImageConfig, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return the picture as the network sees it, uint8 C×H×W; one that already fits passes bit for bit.

    Arrays are H×W or H×W×C (C = 1, 2, 3, 4: grey, grey + alpha, RGB, RGBA), integers in [0, 255] or floats in
    [0, 1]. Pictures are turned by their EXIF orientation, laid over `config.background` where transparent,
    and of an animation the first frame counts. A PIL image is loaded in place, a JPEG perhaps at a fraction
    of its size. Raises `BadImage` and nothing else for bad input; the size is checked before anything is decoded.
    """
    with _refusing():
        data = image if isinstance(image, bytes | bytearray) else None
        picture = opened(image, max_pixels=max_pixels)
        pixels = _decoded_jpeg(data, picture, config) if data is not None else None
        if pixels is None:
            _drafted(picture, config)
            picture.load()
            pixels = np.asarray(_to_channels(_upright(picture), config))
        elif pixels.shape[2:] != (3,) * (config.channels == 3):
            pixels = np.asarray(_to_channels(Image.fromarray(pixels), config))
        pixels = _resized(pixels, config)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def opened(image: bytes | np.ndarray | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a picture that `to_input` takes, its size known and nothing of it decoded; raises `BadImage`."""
    with _refusing():
        if isinstance(image, np.ndarray):
            image = _from_array(image, max_pixels)
        elif not isinstance(image, Image.Image):
            image = _recognised(image, max_pixels)
        _check_size(image.size, max_pixels)
        return image


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn whatever Pillow raises into `BadImage`: its readers raise nearly anything for damaged bytes."""
    try:
        yield
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory to decode") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImage(f"cannot be decoded: {reason[:120]}") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(f"{width}×{height} pixels: nothing to see")
    if width * height > max_pixels:
        raise BadImage(f"{width}×{height} pixels, more than the limit of {max_pixels}")


def _recognised(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("zero bytes")
    Image.init()  # `formats` may only name plugins that are loaded
    try:
        return Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        raise BadImage(f"more pixels than the limit of {max_pixels}") from None
    except Image.UnidentifiedImageError:
        raise BadImage("not an image of a known format") from None


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise BadImage(f"array of shape {array.shape}: expected height × width or height × width × 1 to 4")
    _check_size((array.shape[1], array.shape[0]), max_pixels)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise BadImage("array holds NaN or infinity")
        if array.min() < 0 or array.max() > 1:
            raise BadImage(f"float array spans {array.min():g} to {array.max():g}: expected 0 to 1")
        array = _scaled(array, 255)
    elif array.dtype.kind not in "ui":
        raise BadImage(f"array of type {array.dtype}: expected uint8, or floats in 0 to 1")
    elif array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise BadImage(f"array spans {array.min()} to {array.max()}: expected 0 to 255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def _reduction(image: Image.Image, config: ImageConfig) -> int:
    """Return by how much a JPEG is decoded smaller: faster, and still at least twice the size that is needed."""
    if config.interpolation == "nearest":
        return 1
    room = min(image.size) // (2 * max(config.size))
    return next((factor for factor in (8, 4, 2) if factor <= room), 1)


def _drafted(image: Image.Image, config: ImageConfig) -> None:
    factor = _reduction(image, config)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))


def _decoded_jpeg(data: bytes | bytearray, image: Image.Image, config: ImageConfig) -> np.ndarray | None:
    """Return a sound JPEG's pixels upright, H×W or H×W×3, as Pillow has them; None where Pillow is to judge."""
    import simplejpeg

    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    factor = _reduction(image, config)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if image.mode == "L" else "RGB",
            min_factor=factor,
            min_width=-(-image.width // factor),
            min_height=-(-image.height // factor),
        )
    except ValueError:  # damaged, or a kind that it does not know
        return None
    turned = _TURNS.get(_orientation(image), lambda upright: upright)(pixels)
    return turned[:, :, 0] if image.mode == "L" else turned


# What brings stored pixels (rows × columns × channels) upright, by EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_channels(image: Image.Image, config: ImageConfig) -> Image.Image:
    """Convert any mode to L or RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")  # type: ignore[assignment]
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        over = Image.new("RGBA", image.size, (config.background,) * 3 + (255,))
        image = Image.alpha_composite(over, image.convert("RGBA")).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.convert("L" if config.channels == 1 else "RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale deep grey to 8 bits; the white of modes I and F is the least of 1 (F), 255, 65535 that fits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())  # NaN, where there is one
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > 65535:
        raise BadImage(f"{image.mode} pixels span {low:g} to {high:g}: expected 8-bit or 16-bit grey")
    if image.mode == "F" and high <= 1:
        white = 1.0
    else:
        white = 255.0 if image.mode in ("I", "F") and high <= 255 else 65535.0
    return Image.fromarray(_scaled(values, 255 / white))


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    """Return `values` times `factor`, rounded, as uint8; piece by piece, as doubles take eight bytes a pixel."""
    scaled = np.empty(values.shape, np.uint8)
    flat, target = values.reshape(-1), scaled.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float64)
        target[start : start + _PIECE] = np.rint(piece * factor)
    return scaled


def _resized(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Bring H×W or H×W×3 to `config.size`."""
    height, width = config.size
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    whole = (0.0, 0.0, float(columns), float(rows))
    if config.resize == "stretch":
        return _resampled(pixels, (width, height), whole, config.interpolation)
    if config.resize == "crop":
        scale = min(columns / width, rows / height)
        kept = min(width * scale, float(columns)), min(height * scale, float(rows))
        box = ((columns - kept[0]) / 2, (rows - kept[1]) / 2, *kept)
        return _resampled(pixels, (width, height), box, config.interpolation)
    scale = min(width / columns, height / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    canvas = np.full((height, width, *pixels.shape[2:]), config.background, np.uint8)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    canvas[top : top + size[1], left : left + size[0]] = _resampled(pixels, size, whole, config.interpolation)
    return canvas


def _resampled(pixels: np.ndarray, size: tuple[int, int], box: Box, interpolation: str) -> np.ndarray:
    """Resample the box (left, top, width, height) to `size` (width, height), antialiased."""
    left, top, width, height = box
    edges = (left, top, min(left + width, pixels.shape[1]), min(top + height, pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[interpolation.upper()], edges))
