"""Formats of whole arrays (IDX, CIFAR-10, CSV, NPZ): files come in; images and labels by split go out.

Images are uint8, N×H×W or N×H×W×C; labels int64. Damaged bytes raise `UserError` naming the file.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from cnn_tuning.config import CsvConfig, DataConfig
from cnn_tuning.errors import UserError

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]

_SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset"),
    "test": ("test", "testing", "testset", "t10k"),
}
_CIFAR_PIXELS = 3 * 32 * 32


def _split_of(name: str) -> str | None:
    """Return the split that a whole word of a name says, `train` before the others; a number may end the word."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    said = {*words, *(word.rstrip("0123456789") for word in words)}
    return next((split for split, known in _SPLIT_WORDS.items() if said & {*known}), None)


def _joined(images: np.ndarray, labels: np.ndarray, place: str) -> tuple[np.ndarray, np.ndarray]:
    if len(images) != len(labels):
        raise UserError(f"{place}: {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise UserError(f"{place}: no images")
    return images, labels


# --- IDX -------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain (as a memory map) or gzip (yann.lecun.com/exdb/mnist)."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        data = np.frombuffer(_gunzipped(path), np.uint8)
    else:
        data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    head = data[:4].tobytes()
    if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] not in (1, 2, 3, 4):
        raise UserError(f"{path}: not an IDX file of unsigned bytes (starts with {head.hex() or 'nothing'})")
    start = 4 + 4 * head[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start].tobytes()[: (len(data) - 4) // 4 * 4], ">u4"))
    if len(shape) != head[3] or start + math.prod(shape) != len(data):
        expected = f"{start + math.prod(shape)} bytes" if len(shape) == head[3] else f"{head[3]} dimensions"
        raise UserError(f"{path}: truncated or overlong: {len(data)} bytes, its header says {expected}")
    return data[start:].reshape(shape)


def _gunzipped(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from None


def read_idx_files(config: DataConfig, root: Path) -> Arrays:
    """Read pairs of files whose names hold train, val, test or t10k, and images or labels."""
    arrays: Arrays = {}
    images = {_split_of(n) or "train": n for n in config.files if "labels" not in n}
    labels = {_split_of(n) or "train": n for n in config.files if "labels" in n}
    if images.keys() != labels.keys():
        raise UserError(f"data.files: every IDX file of images needs one of labels; got {', '.join(config.files)}")
    for split, name in images.items():
        pixels, classes = read_idx(root / name), read_idx(root / labels[split])
        if pixels.ndim < 3 or classes.ndim != 1:
            raise UserError(f"{root / name}: {pixels.ndim} dimensions, expected images × height × width")
        arrays[split] = _joined(pixels, classes.astype(np.int64), str(root / name))
    return arrays


# --- CIFAR-10 --------------------------------------------------------------------------------------------


def _cifar_batches(root: Path, suffix: str) -> dict[str, list[Path]]:
    batches = {
        "train": sorted(root.rglob(f"data_batch_[0-9]{suffix}")),
        "test": sorted(root.rglob(f"test_batch{suffix}")),
    }
    for split, paths in batches.items():
        if not paths:
            name = "data_batch_1" if split == "train" else "test_batch"
            raise UserError(f"{root}: no {name}{suffix}: not the CIFAR-10 archive of this format")
    return batches


def _stacked(batches: dict[str, list[Path]], read: Any) -> Arrays:
    arrays: Arrays = {}
    for split, paths in batches.items():
        parts = [read(path) for path in paths]
        flat, labels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        images = flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays[split] = _joined(images, labels, str(paths[0]))
    return arrays


def read_cifar_binary(config: DataConfig, root: Path) -> Arrays:
    """Read records of one label byte and 3,072 pixels (cs.toronto.edu/~kriz/cifar.html)."""

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        data = np.fromfile(path, np.uint8)
        if len(data) == 0 or len(data) % (1 + _CIFAR_PIXELS):
            raise UserError(f"{path}: {len(data)} bytes are no whole number of {1 + _CIFAR_PIXELS}-byte records")
        records = data.reshape(-1, 1 + _CIFAR_PIXELS)
        return records[:, 1:], records[:, 0].astype(np.int64)

    return _stacked(_cifar_batches(root, ".bin"), read)


def read_cifar_python(config: DataConfig, root: Path) -> Arrays:
    """Read pickled batches with `data` (N×3,072, uint8) and `labels`, building arrays and containers only."""

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="bytes").load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(f"{path}: damaged pickle ({type(error).__name__}: {error})") from None
        batch = (
            {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
            if isinstance(batch, dict)
            else {}
        )
        data, labels = batch.get("data"), batch.get("labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_CIFAR_PIXELS,):
            raise UserError(f"{path}: expected `data` of unsigned bytes, images × {_CIFAR_PIXELS}")
        if not isinstance(labels, list) or not all(type(n) is int for n in labels) or len(labels) != len(data):
            raise UserError(f"{path}: expected `labels`, a list of {len(data)} integers")
        return data, np.array(labels, np.int64)

    return _stacked(_cifar_batches(root, ""), read)


class _ArrayUnpickler(pickle.Unpickler):
    """Finds what rebuilds a numpy array and nothing else."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise UserError(f"refused: the pickle asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


# --- CSV of pixels ---------------------------------------------------------------------------------------


def read_csv(file: Path | IO[bytes], config: CsvConfig, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read lines of a label and one image's pixels: uint8 N×pixels scaled to 255, and int64 labels."""
    import pandas as pd

    stream = file.open("rb") if isinstance(file, Path) else file
    try:
        with stream:
            if stream.read(2) == b"\x1f\x8b":
                stream.seek(0)
                stream = io.BytesIO(gzip.decompress(stream.read()))
            stream.seek(0)
            for _ in range(config.header_lines):
                stream.readline()
            start = stream.tell()
            columns = stream.readline().count(b",") + 1
            stream.seek(start)
            if columns < 2:
                raise UserError(f"{name}: expected a label and pixels in each line, separated by commas")
            label = 0 if config.label == "first" else columns - 1
            kind = np.uint8 if config.white == 255 else np.float32
            kinds = {i: np.int64 if i == label else kind for i in range(columns)}
            # The C parser needs the kinds by column and refuses what does not fit (256, -1, 1.5, nothing).
            table = pd.read_csv(stream, header=None, names=range(columns), dtype=kinds, index_col=False)
    except UserError:
        raise
    except (ValueError, OverflowError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: not a CSV of pixels: {str(error).splitlines()[0]}") from None
    labels = table.pop(label).to_numpy()  # type: ignore[arg-type]
    pixels = table.to_numpy()
    if kind is np.float32:
        if not np.isfinite(pixels).all() or pixels.min(initial=0) < 0 or pixels.max(initial=0) > config.white:
            raise UserError(f"{name}: pixels outside 0 to {config.white:g} (data.csv.white)")
        pixels = np.rint(pixels.astype(np.float64) * (255 / config.white)).astype(np.uint8)
    return pixels, labels


def read_csv_files(config: DataConfig, root: Path) -> Arrays:
    """Read one CSV a split, by the words train, val and test in the names; without one it is train."""
    arrays: Arrays = {}
    height, width = config.image.size
    for name in config.files:
        pixels, labels = read_csv(root / name, config.csv, str(root / name))
        side = math.isqrt(pixels.shape[1])
        if pixels.shape[1] == height * width:
            shape: tuple[int, ...] = (height, width)
        elif pixels.shape[1] == height * width * 3:
            shape = (height, width, 3)
        elif side * side == pixels.shape[1]:
            shape = (side, side)
        else:
            raise UserError(
                f"{root / name}: {pixels.shape[1]} pixels a line are not {height}×{width} (data.image.size)"
            )
        split = _split_of(name) or "train"
        _refuse_second(arrays, split, str(root / name))
        arrays[split] = _joined(pixels.reshape(-1, *shape), labels, str(root / name))
    return arrays


def _refuse_second(arrays: Arrays, split: str, place: str) -> None:
    if split in arrays:
        raise UserError(f"{place}: a second file for the split {split}: join them, or name them by split")


# --- NPZ -------------------------------------------------------------------------------------------------


def read_npz_files(config: DataConfig, root: Path) -> Arrays:
    """Read pairs such as `x_train` and `y_train`, `test_images` and `test_labels`, or `images` and `labels`.

    Images: N×H×W, N×H×W×C or N×C×H×W, integers in [0, 255] or floats in [0, 1]. Labels: indices or one-hot.
    """
    arrays: Arrays = {}
    for file in config.files:
        table = _members(root / file)
        for name, images in table.items():
            other = _label_name(name, table)
            if other is None:
                continue
            split = _split_of(name) or _split_of(file) or "train"
            place = f"{root / file}: {name}"
            _refuse_second(arrays, split, place)
            arrays[split] = _joined(
                _pixels(images, place), _indices(table[other], f"{root / file}: {other}"), place
            )
    if not arrays:
        raise UserError(f"{root}: no pair such as x_train and y_train, or images and labels, in the NPZ file")
    return arrays


def _members(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: a single array, expected an NPZ file of images and labels")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except UserError:
        raise
    except Exception as error:  # zip, zlib and header parsers each raise their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged or not an NPZ file ({reason})") from None


def _label_name(name: str, table: dict[str, np.ndarray]) -> str | None:
    for word, other in (("images", "labels"), ("x_", "y_"), ("_x", "_y"), ("X_", "y_")):
        if word in name and name.replace(word, other) in table:
            return name.replace(word, other)
    return "y" if name in ("x", "X") and "y" in table else None


def _pixels(images: np.ndarray, place: str) -> np.ndarray:
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim not in (3, 4) or images.size == 0 or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise UserError(f"{place}: shape {images.shape}, expected images × height × width (× channels)")
    if images.dtype == np.uint8:
        return images
    white = 1 if images.dtype.kind == "f" else 255
    if images.dtype.kind not in "fui" or not (images.min() >= 0 and images.max() <= white):
        raise UserError(f"{place}: {images.dtype} values, expected unsigned bytes or floats in 0 to 1")
    return np.rint(images * (255 / white)).astype(np.uint8)


def _indices(labels: np.ndarray, place: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and ((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all():
        return labels.argmax(axis=1)
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise UserError(
            f"{place}: {labels.dtype} {labels.shape}, expected whole numbers, one an image, or one-hot"
        )
    return labels.astype(np.int64)
