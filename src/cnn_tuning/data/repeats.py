"""Equal images: splits in, which images come again (within a split, or in another one) out."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.data.packed import PackedData

BLOCK = 4096

Digests = NDArray[np.uint64]


def digests_of(data: PackedData, split: str) -> Digests:
    """Return the digests of a split's images, computed once for all trainings of a process."""
    return _digests(data.path, split, data.meta.digests[split])


@functools.lru_cache(maxsize=4)
def _digests(path: Path, split: str, content: str) -> Digests:
    return image_digests(PackedData.open(path).split(split).images)


def image_digests(images: np.ndarray) -> Digests:
    """Return a digest of each image's bytes, `BLOCK` images in memory at a time.

    64 bits: that two of ten million different images are taken for equal has a chance of 3 in a million.
    """
    digests = bytearray()
    for start in range(0, len(images), BLOCK):
        block = np.ascontiguousarray(images[start : start + BLOCK])
        digests += b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in block)
    return np.frombuffer(bytes(digests), np.uint64)


def repetitions(digests: Digests, labels: np.ndarray) -> tuple[int, int]:
    """Return how many images repeat an earlier one, and how many have an equal one with another label."""
    _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    lowest = np.full(len(sizes), np.iinfo(np.int64).max)
    highest = np.full(len(sizes), -1)
    np.minimum.at(lowest, group, labels)
    np.maximum.at(highest, group, labels)
    return int((sizes - 1).sum()), int(sizes[lowest != highest].sum())


def shared_images(train: Digests, val: Digests) -> NDArray[np.int64]:
    """Return (train, val) positions for each validation image that the training split has too: its first there."""
    unique, first = np.unique(train, return_index=True)
    at = np.minimum(np.searchsorted(unique, val), len(unique) - 1)
    found = np.flatnonzero(unique[at] == val)
    return np.stack([first[at[found]], found], axis=1).astype(np.int64)
