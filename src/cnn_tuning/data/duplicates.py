"""Near-duplicates: perceptual hashes and thumbnails come in, pairs of pictures that look alike go out.

Pairs within a few bits of 64 are found by multi-index hashing (Norouzi, Punjani, Fleet 2012): hashes that differ
in at most `bits` agree in one of `bits + 1` bands. A pair counts if its thumbnails agree, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

BITS = 4
_ALIKE = 0.97  # correlation of the thumbnails
_FLAT = 4.0  # standard deviation in grey levels below which a picture has nothing to recognise
_MOST_IN_BAND = 2000  # pictures that share a band beyond this are compared with their neighbours only


def hash_of(grey: np.ndarray) -> int:
    """Return the 64-bit perceptual hash of a 32×32 grey picture (`imagehash.phash`)."""
    import imagehash
    from PIL import Image

    return int(str(imagehash.phash(Image.fromarray(grey))), 16)


def near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Return pairs of indices (P×2, first below second, sorted) of pictures that look alike.

    `hashes`: uint64, N. `thumbnails`: uint8, N×T. Among equal hashes each picture is paired with the one before,
    so k copies make k - 1 pairs.
    """
    flat = thumbnails.astype(np.float32).std(axis=1) < _FLAT
    order = np.flatnonzero(~flat)[np.argsort(hashes[~flat], kind="stable")]
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    found = [np.stack([order[same], order[same + 1]], axis=1)]
    first = np.setdiff1d(np.arange(len(order)), same + 1)  # one of each group of equal hashes
    unique = order[first]
    found += [unique[pairs] for pairs in _candidates(hashes[unique])]
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return pairs[_alike(thumbnails, pairs)]


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs of places whose hashes, all different, are within `BITS` bits."""
    edges = np.linspace(0, 64, BITS + 2).astype(int)
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        sizes = np.diff(np.r_[starts, len(order)])
        for step in range(1, min(int(sizes.max(initial=0)), _MOST_IN_BAND)):
            # All pairs of a band, by their distance in the order.
            left = np.arange(len(order) - step)
            left = left[band[order[left]] == band[order[left + step]]]
            pairs = np.stack([order[left], order[left + step]], axis=1)
            near = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= BITS
            if near.any():
                yield pairs[near]


def _alike(thumbnails: np.ndarray, pairs: np.ndarray, block: int = 65536) -> np.ndarray:
    good = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), block):
        left, right = (thumbnails[pairs[start : start + block, side]].astype(np.float32) for side in (0, 1))
        left, right = (x - x.mean(axis=1, keepdims=True) for x in (left, right))
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        good[start : start + block] = (left * right).sum(axis=1) >= _ALIKE * norms
    return good
