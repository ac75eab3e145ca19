"""A look at a folder of pictures: a path comes in, what is in it goes out, nothing is changed.

Each picture is read as preprocessing reads it, so what is unreadable here is left out there.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_tuning.config import ImageConfig
from cnn_tuning.data.duplicates import hash_of, near_duplicates
from cnn_tuning.data.folders import read_folder
from cnn_tuning.data.images import BadImage, opened, to_input
from cnn_tuning.data.progress import with_progress
from cnn_tuning.machine import usable_cores

_GREY = ImageConfig((32, 32), 1, "stretch")
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True)
class Picture:
    """One readable picture: upright width and height, and what it looks like."""

    path: str
    split: str
    label: int
    width: int
    height: int
    mode: str
    format: str


@dataclass(frozen=True)
class Survey:
    """`splits`: those that the folder has. `counts`: readable pictures of each class, by split.

    `unreadable`: (path, reason). `duplicates`: pairs of indices of `pictures` that look alike.
    """

    root: Path
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    pictures: tuple[Picture, ...]
    unreadable: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[int, int], ...]

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Return the classes of the readable pictures, by split."""
        return {s: np.array([p.label for p in self.pictures if p.split == s], np.int64) for s in self.splits}

    @property
    def is_grey(self) -> bool:
        """Say whether no picture is stored in colour."""
        return all(p.mode.startswith("I") or p.mode in _GREY_MODES for p in self.pictures)

    @property
    def sides(self) -> np.ndarray:
        """Return the shorter side of each picture."""
        return np.array([min(p.width, p.height) for p in self.pictures])

    def tally(self, what: str) -> dict[str, int]:
        """Count the pictures by `mode` or `format`, the most frequent first."""
        return dict(Counter(getattr(p, what) for p in self.pictures).most_common())

    def across_splits(self) -> list[tuple[Picture, Picture]]:
        """Return the near-duplicates that stand in different splits."""
        pairs = [(self.pictures[a], self.pictures[b]) for a, b in self.duplicates]
        return [(a, b) for a, b in pairs if a.split != b.split]

    def within_splits(self) -> list[tuple[Picture, Picture]]:
        """Return the near-duplicates that stand in one split."""
        pairs = [(self.pictures[a], self.pictures[b]) for a, b in self.duplicates]
        return [(a, b) for a, b in pairs if a.split == b.split]


def survey(folder: Path, workers: int | None = None) -> Survey:
    """Look at every picture below `folder`; raises `UserError` where it is no folder of classes."""
    found = read_folder(folder, None)
    jobs = [
        (split, int(label), path)
        for split, (paths, labels) in found.splits.items()
        for path, label in zip(paths, labels, strict=True)
    ]
    pictures, hashes, thumbnails = [], [], []
    unreadable = list(found.rejected)
    for (split, label, path), seen in zip(jobs, _seen(found.root, [job[2] for job in jobs], workers), strict=True):
        if isinstance(seen, str):
            unreadable.append((path, seen))
            continue
        width, height, mode, format_, digest, thumbnail = seen
        pictures.append(Picture(path, split, label, width, height, mode, format_))
        hashes.append(digest)
        thumbnails.append(thumbnail)
    pairs = np.empty((0, 2), int)
    if len(pictures) > 1:
        small = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(len(thumbnails), -1)
        pairs = near_duplicates(np.array(hashes, np.uint64), small)
    counts = {split: [0] * len(found.classes) for split in found.splits}
    for picture in pictures:
        counts[picture.split][picture.label] += 1
    return Survey(
        root=found.root,
        classes=found.classes,
        splits=tuple(found.splits),
        counts={split: tuple(numbers) for split, numbers in counts.items()},
        pictures=tuple(pictures),
        unreadable=tuple(sorted(unreadable)),
        duplicates=tuple((int(a), int(b)) for a, b in pairs),
    )


Seen = tuple[int, int, str, str, int, bytes]


def look(root: Path, path: str) -> Seen | str:
    """Return width, height, mode, format, hash and thumbnail of a picture, or why it cannot be read."""
    try:
        data = (root / path).read_bytes()
        image = opened(data)
        grey = to_input(data, _GREY)[0]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except BadImage as error:
        return str(error)
    width, height = image.size
    if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
        width, height = height, width
    thumbnail = np.asarray(Image.fromarray(grey).reduce(2)).tobytes()
    return width, height, image.mode, image.format or "?", hash_of(grey), thumbnail


def _seen(root: Path, paths: Sequence[str], workers: int | None) -> Iterator[Seen | str]:
    cores = workers or usable_cores()
    if cores == 1 or len(paths) <= 500:
        yield from with_progress((look(root, path) for path in paths), "look", len(paths))
        return
    # Not fork: the caller may have threads, and a forked lock stays locked.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("forkserver")) as pool:
        yield from with_progress(pool.map(partial(look, root), paths, chunksize=32), "look", len(paths))
