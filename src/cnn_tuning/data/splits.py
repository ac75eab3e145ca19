"""Stratified splits: labels of the official splits come in, sorted indices of train, val and test go out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnn_tuning.config import DataConfig
from cnn_tuning.data.packed import SPLITS, class_counts
from cnn_tuning.errors import UserError

# Streams of random numbers, apart for every seed.
_TEST_STREAM = (0, 0x5917)
_VAL_STREAM = 0x7A1

Picks = dict[str, tuple[str, np.ndarray]]


def assign(labels: dict[str, np.ndarray], classes: Sequence[str], config: DataConfig, seed: int) -> Picks:
    """Return for train, val and test the official split that feeds it and the indices in that split.

    `limit` thins each official split first. A missing test split, then a missing validation split, is held
    out of train, stratified, with at least one image of each class: a pure function of the arguments.
    Official splits keep all their images. Raises `UserError` where a class cannot be in every split.
    """
    _check_classes(labels["train"], classes)
    # The same test images for every seed: otherwise models of two seeds could not be compared on them.
    rng = np.random.default_rng(_TEST_STREAM)
    picks: Picks = {}
    for split in SPLITS:
        if split in labels:
            keep = np.arange(len(labels[split]))
            if config.limit is not None and config.limit < len(keep):
                keep = stratified(labels[split], config.limit, rng, f"data.limit ({split})")
            picks[split] = split, keep
    held = [split for split in ("test", "val") if split not in labels]
    train = picks["train"][1]
    _check_sizes(labels["train"][train], classes, held)
    for place, split in enumerate(held):
        count, key = _held_count(config, split, len(train))
        if count >= len(train):
            raise UserError(f"{key} would hold out {count} of {len(train)} training images: make it smaller")
        if split == "val":
            rng = np.random.default_rng([seed, _VAL_STREAM])
        chosen = stratified(labels["train"][train], count, rng, key, spare=len(held) - place)
        picks[split] = "train", train[chosen]
        train = np.delete(train, chosen)
    picks["train"] = "train", train
    return {split: picks[split] for split in SPLITS}


def _held_count(config: DataConfig, split: str, available: int) -> tuple[int, str]:
    if split == "test":
        return round(config.test_fraction * available), "data.test_fraction"
    if config.val_samples is not None:
        return config.val_samples, "data.val_samples"
    return round(config.val_fraction * available), "data.val_fraction"


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator, key: str, spare: int = 0) -> np.ndarray:
    """Choose `count` sorted indices, classes in proportion but each that occurs at least once.

    At least `spare` images of each class stay behind. Raises `UserError` naming `key`.
    """
    names, sizes = np.unique(labels, return_counts=True)
    if count < len(names):
        raise UserError(f"{key}: {count} images are too few for {len(names)} classes: raise it")
    room = sizes - spare
    if room.min() < 1 or count > room.sum():
        raise UserError(f"{key}: {count} images of {len(labels)} leave none of some class: make it smaller")
    exact = count * sizes / sizes.sum()
    quota = np.clip(np.floor(exact).astype(int), 1, room)
    while (gap := count - int(quota.sum())) != 0:
        step = 1 if gap > 0 else -1
        movable = quota < room if step > 0 else quota > 1
        wish = np.where(movable, step * (exact - quota), -np.inf)
        # Stable order: ties go to the lowest class.
        for place in np.argsort(-wish, kind="stable")[: min(abs(gap), int(movable.sum()))]:
            quota[place] += step
    chosen = [rng.permutation(np.flatnonzero(labels == name))[:n] for name, n in zip(names, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


def _check_classes(labels: np.ndarray, classes: Sequence[str]) -> None:
    if len(set(classes)) != len(classes):
        raise UserError("data.classes: a name appears twice")
    if len(classes) < 2:
        only = f" ({classes[0]!r})" if classes else ""
        raise UserError(f"the data has {len(classes)} class{only}: classification needs at least 2")
    counts = class_counts(labels, len(classes))
    empty = [name for name, n in zip(classes, counts, strict=True) if n == 0]
    if empty:
        raise UserError(f"no training image in {_listed(empty)}: add images, or take the name out of data.classes")


def _check_sizes(labels: np.ndarray, classes: Sequence[str], held: Sequence[str]) -> None:
    need = 1 + len(held)
    counts = class_counts(labels, len(classes))
    small = [f"{name!r} ({n})" for name, n in zip(classes, counts, strict=True) if n < need]
    if small:
        splits = ", ".join(["train", *held])
        raise UserError(f"too few images for one each in {splits}: {_listed(small)}: add images or merge classes")


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
