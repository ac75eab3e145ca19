"""Image folders: a folder comes in; class names, image paths and labels by split go out, nothing decoded."""

from __future__ import annotations

import os
import unicodedata
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
_LINK = "a symbolic link"


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
    nothing but one other folder (as archives often do) is entered. Symbolic links are not followed, wherever
    they lead: they are among the rejected. `classes`: null for the folders' names.
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
        links = _links(list(_strays(root, root)))
        raise UserError(f"{root}: has {', '.join(f.name for f in named.values())} but no train folder{links}")
    parts = {k: named[k] for k in ("train", "val", "test") if k in named} if named else {"train": root}
    rejected = [item for folder in {root, *parts.values()} for item in _strays(folder, root)]
    names = _class_names(root, list(parts.values()), classes, rejected)
    splits: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    for split, part in parts.items():
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            for path, reason in _files(part / name):
                relative = str(path.relative_to(root))
                if reason:
                    rejected.append((relative, reason))
                    continue
                paths.append(relative)
                labels.append(label)
        if not paths and split != "train":
            raise UserError(f"{part}: no images in it{_links(rejected)}: add some, or take the folder away")
        splits[split] = paths, np.array(labels, dtype=np.int64)
    return Folder(root, names, splits, tuple(sorted(rejected)))


def _class_names(
    root: Path, parts: Sequence[Path], classes: tuple[str, ...] | None, rejected: Sequence[tuple[str, str]]
) -> tuple[str, ...]:
    found = sorted({f.name for part in parts for f in _folders(part)})
    if not classes and not found:
        expected = "expected CLASS/image.png or train/CLASS/image.png"
        raise UserError(f"{root}: no class folders{_links(rejected)}: {expected}")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise UserError(f"{root}: folders {', '.join(unknown)} are not among data.classes: add or remove them")
    odd = [name for name in found if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)]
    if odd:
        named = os.fsencode(odd[0])
        raise UserError(f"{root}: folder {named!r}: a class's name is UTF-8 without control characters: rename it")
    return classes or tuple(found)


def _strays(folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        image = path.suffix.lower() in _IMAGE_SUFFIXES
        if path.is_symlink() and (image or path.is_dir()) and not _hidden(path.name):
            yield str(path.relative_to(root)), _LINK
        elif image and path.is_file():
            yield str(path.relative_to(root)), "not in a class folder"


def _links(rejected: Sequence[tuple[str, str]]) -> str:
    count = sum(reason == _LINK for _, reason in rejected)
    return f" ({count} symbolic link{'s' if count > 1 else ''}, not followed)" if count else ""


def _entered(root: Path) -> Path:
    while True:
        folders = _folders(root)
        if len(folders) != 1 or folders[0].name.lower() in _SPLIT_NAMES or not _folders(folders[0]):
            return root
        if any(p.suffix.lower() in _IMAGE_SUFFIXES for p in root.iterdir()):
            return root
        root = folders[0]


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not _hidden(p.name))


def _files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Give each file below with the reason why it is none to read, or None."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if _hidden(entry.name):
            continue
        if entry.is_symlink():
            yield path, _LINK
        elif entry.is_dir():
            yield from _files(path)
        else:
            yield path, None if entry.is_file() else "not a regular file"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")
