"""Image folders: a folder comes in; class names, image paths and labels by split go out, nothing decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn_tuning.errors import UserError

# fmt: off
_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}
_IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".webp", ".avif", ".ppm", ".pgm", ".pbm", ".ico", ".jp2", ".pcx", ".heic",
))
# fmt: on


@dataclass(frozen=True)
class Folder:
    """`splits`: (paths relative to `root`, int64 labels). `rejected`: stray images with the reason."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, tuple[Sequence[str], np.ndarray]]
    rejected: tuple[tuple[str, str], ...]


def read_folder(root: Path, classes: tuple[str, ...] | None) -> Folder:
    """List `train/CLASS/…`, `valid/CLASS/…`, `test/CLASS/…`, or `CLASS/…` alone, in sorted order.

    Images may lie deeper below their class. Hidden files and folders are passed over; a folder that holds
    nothing but one other folder (as archives often do) is entered. `classes`: null for the folders' names.
    """
    root = _entered(root)
    folders = _folders(root)
    named = {_SPLIT_NAMES[f.name.lower()]: f for f in folders if f.name.lower() in _SPLIT_NAMES}
    strays = [f.name for f in folders if named and f not in named.values()]
    if strays:
        raise UserError(
            f"{root}: {', '.join(sorted(strays))} beside {', '.join(f.name for f in named.values())}: keep either "
            "one folder a split (train, valid, test) or one a class"
        )
    if named and "train" not in named:
        raise UserError(f"{root}: has {', '.join(f.name for f in named.values())} but no train folder")
    parts = {k: named[k] for k in ("train", "val", "test") if k in named} if named else {"train": root}
    rejected = [
        (str(p.relative_to(root)), "not in a class folder")
        for folder in {root, *parts.values()}
        for p in folder.iterdir()
        if p.is_file() and p.suffix.lower() in _IMAGE_SUFFIXES
    ]
    names = classes or tuple(sorted({f.name for part in parts.values() for f in _folders(part)}))
    if not names:
        raise UserError(f"{root}: no class folders: expected CLASS/image.png or train/CLASS/image.png")
    unknown = sorted({f.name for part in parts.values() for f in _folders(part)} - set(names))
    if unknown:
        raise UserError(f"{root}: folders {', '.join(unknown)} are not among data.classes: add or remove them")
    splits: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    for split, part in parts.items():
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            for path in _files(part / name):
                relative = str(path.relative_to(root))
                if path.is_symlink():
                    rejected.append((relative, "a symbolic link"))
                    continue
                paths.append(relative)
                labels.append(label)
        splits[split] = paths, np.array(labels, dtype=np.int64)
    return Folder(root, names, splits, tuple(sorted(rejected)))


def _entered(root: Path) -> Path:
    while True:
        folders = _folders(root)
        if len(folders) != 1 or folders[0].name.lower() in _SPLIT_NAMES or not _folders(folders[0]):
            return root
        if any(p.suffix.lower() in _IMAGE_SUFFIXES for p in root.iterdir()):
            return root
        root = folders[0]


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not _hidden(p))


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _hidden(path):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in ("__MACOSX", "Thumbs.db", "desktop.ini")
