"""Readers: raw files come in, are verified; images (arrays or paths) and labels by official split go out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn_tuning.config import DataConfig
from cnn_tuning.data import digests
from cnn_tuning.data.archives import extract, is_archive
from cnn_tuning.data.folders import Folder, read_folder
from cnn_tuning.errors import UserError

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class RawSplit:
    """`images`: uint8 N×H×W or N×H×W×C, or N paths below `root`. `labels`: int64, N, indices of classes."""

    images: np.ndarray | Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RawData:
    """`splits`: train, and val and test where the data has them. `rejected`: (path, reason) of stray files.

    `digests`: SHA-256 of each raw file; empty for a folder of images.
    """

    classes: tuple[str, ...]
    splits: dict[str, RawSplit]
    digests: dict[str, str]
    root: Path
    rejected: tuple[tuple[str, str], ...] = ()


@contextmanager
def read(config: DataConfig, raw: Path, *, work: Path | None = None) -> Iterator[RawData]:
    """Open the raw files of a data set; each is checked against its digests before anything is parsed.

    A context: archives are unpacked into a temporary folder in `work` (null: beside `raw`) that goes with it.
    Raises `UserError` that names the file where the bytes are not what the format says.
    """
    found: dict[str, str] = {}
    for name, expected in config.files.items():
        if not (raw / name).is_file():
            raise UserError(f"{raw / name} is missing: run `dvc repro fetch` first")
        found[name] = digests.check(raw / name, expected, str(raw / name))
    if not raw.is_dir():
        raise UserError(f"{raw} is missing: run `dvc repro fetch` first")
    packed = [name for name in config.files if is_archive(raw / name)]
    if not packed:
        yield _read(config, raw, found)
        return
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=work or raw.parent) as unpacked:
        for name in packed:
            extract(raw / name, Path(unpacked) / name)
        yield _read(config, Path(unpacked), found)


def _read(config: DataConfig, root: Path, found: dict[str, str]) -> RawData:
    if config.format == "image_folder":
        folder: Folder = read_folder(root, config.classes)
        splits = {name: RawSplit(paths, labels) for name, (paths, labels) in folder.splits.items()}
        return RawData(folder.classes, splits, found, folder.root, folder.rejected)
    arrays = _arrays(config, root)
    if "train" not in arrays:
        raise UserError(f"{root}: no training images among {', '.join(arrays) or 'nothing'}")
    most = len(config.classes) if config.classes else len(arrays["train"][1])
    for name, (_, labels) in arrays.items():
        bad = np.flatnonzero((labels < 0) | (labels >= most))
        if len(bad):
            why = "" if config.classes else f" ({most} training images make at most {most} classes)"
            place = f"{root}: {name} image {bad[0]} has label {labels[bad[0]]}"
            raise UserError(f"{place}, expected 0 to {most - 1}{why}")
    highest = max(int(labels.max()) for _, labels in arrays.values())
    classes = config.classes or tuple(str(i) for i in range(highest + 1))
    splits = {name: RawSplit(images, labels.astype(np.int64)) for name, (images, labels) in arrays.items()}
    return RawData(classes, splits, found, root)


def _arrays(config: DataConfig, root: Path) -> Arrays:
    try:
        return _readers()[config.format](config, root)
    except UserError as error:
        # What a damaged file says of itself may be a page long.
        raise UserError(_short(error)) from None
    except (ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{root}: not readable as {config.format}: {_short(error)}") from None


def _short(error: Exception, most: int = 400) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) <= most else f"{text[:most]}…"


def _readers() -> dict[str, Callable[[DataConfig, Path], Arrays]]:
    from cnn_tuning.data import arrays

    return {
        "idx": arrays.read_idx_files,
        "cifar_binary": arrays.read_cifar_binary,
        "cifar_python": arrays.read_cifar_python,
        "csv": arrays.read_csv_files,
        "npz": arrays.read_npz_files,
    }
