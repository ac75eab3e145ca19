"""Preprocessing: raw files and a `DataConfig` come in, a folder of packed splits (`packed.py`) goes out."""

from __future__ import annotations

import csv
import errno
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn_tuning.config import DataConfig
from cnn_tuning.data.convert import Chunk, Converted, ImageFile, chunks_of, convert_all, fits
from cnn_tuning.data.formats import RawData, read
from cnn_tuning.data.packed import SPLITS, Meta, class_counts
from cnn_tuning.data.progress import with_progress
from cnn_tuning.data.splits import Picks, assign
from cnn_tuning.errors import UserError
from cnn_tuning.machine import usable_cores

_SHOWN = 50


def prepare(
    config: DataConfig,
    raw: Path,
    out: Path,
    *,
    seed: int,
    workers: int | None = None,
    refused: Path | None = None,
) -> Meta:
    """Write `out` (replaced only when all went well) and return its `Meta`. `workers`: null for all cores.

    Bad images are left out after the splits are drawn and listed in `rejected.csv`, or (`bad_images: fail`)
    raise one `UserError` that names the first of them; the file `refused` then lists them all. The bytes are the
    same for any number of workers; memory holds a few chunks of images, whatever their number.
    """
    out = Path(out)
    work = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with read(config, Path(raw), work=work) as data:
            meta = _pack(config, data, work, seed, workers or usable_cores(), refused)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or out}: {error.strerror}; {out} is as it was") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return meta


@dataclass
class _Tally:
    """What conversion adds up: valid images by split, rejected ones, sums of the training split."""

    valid: dict[str, np.ndarray]
    rejected: list[tuple[str, str]]
    sums: list[int]
    squares: list[int]
    files: int = 0

    def add(self, done: Converted) -> None:
        self.valid[done.split][done.start : done.start + len(done.valid)] = done.valid
        self.rejected += done.rejected
        self.files = (self.files + done.files) % (1 << 256)
        if done.split == "train":
            self.sums = [a + b for a, b in zip(self.sums, done.sums, strict=True)]
            self.squares = [a + b for a, b in zip(self.squares, done.squares, strict=True)]


def _check_counts(config: DataConfig, data: RawData) -> None:
    """Refuse data that is not what its configuration says, before any of it is decoded."""
    if config.counts is None:
        return
    wanted = {str(name): count for name, count in config.counts.items()}
    found = {name: len(split) for name, split in data.splits.items()}
    wrong = [
        f"{found.get(name, 0):,} {name} images instead of {wanted.get(name, 0):,}"
        for name in SPLITS
        if found.get(name, 0) != wanted.get(name, 0)
    ]
    if wrong:
        remedy = "fetch the whole archive, or set data.counts to what it has (null: any number)"
        raise UserError(f"{config.name}: {', '.join(wrong)}: {remedy}")


def _pack(config: DataConfig, data: RawData, work: Path, seed: int, workers: int, refused: Path | None) -> Meta:
    _check_counts(config, data)
    picks = assign({name: s.labels for name, s in data.splits.items()}, data.classes, config, seed)
    labels = {split: data.splits[source].labels[indices] for split, (source, indices) in picks.items()}
    files = {s: ImageFile(work / s / "images.npy", len(labels[s]), config.image) for s in SPLITS}
    tally = _converted(config, data, picks, files, workers)
    labels = {split: labels[split][tally.valid[split]].astype(np.int64) for split in SPLITS}
    counts = {split: class_counts(labels[split], len(data.classes)) for split in SPLITS}
    _judge(config, data.classes, counts, tally.rejected, refused)
    digests = {}
    for split, file in files.items():
        file.compact(tally.valid[split])
        np.save(work / split / "labels.npy", labels[split])
        digests[split] = file.digest(labels[split])
    mean, std = _statistics(tally, sum(counts["train"]) * math.prod(config.image.size))
    meta = Meta(
        name=config.name,
        classes=data.classes,
        image=config.image,
        counts=counts,
        mean=mean,
        std=std,
        bytes=sum(map(len, labels.values())) * config.image.channels * math.prod(config.image.size),
        seed=seed,
        sources=dict(data.digests) or {"images": f"{tally.files:064x}"},
        digests=digests,
    )
    (work / "meta.json").write_text(meta.to_json(), encoding="utf-8")
    _write_rejected(work / "rejected.csv", tally.rejected)
    return meta


def _converted(
    config: DataConfig, data: RawData, picks: Picks, files: dict[str, ImageFile], workers: int
) -> _Tally:
    zeros = [0] * config.image.channels
    valid = {split: np.ones(file.count, bool) for split, file in files.items()}
    tally = _Tally(valid, list(data.rejected), zeros, zeros)
    total = sum(file.count for file in files.values())
    easy = all(fits(split.images, config.image) for split in data.splits.values())

    def chunks() -> Iterator[Chunk]:
        for split, (source, indices) in picks.items():
            files[split].create()
            yield from chunks_of(split, data.splits[source].images, indices, data.root, files[split])

    # Starting a pool costs more than copying arrays or decoding a handful of images.
    alone = easy or total <= 256
    converted = convert_all(chunks(), 1 if alone else workers)
    for done in with_progress(converted, "preprocess", total, lambda done: len(done.valid)):
        tally.add(done)
    return tally


def _judge(
    config: DataConfig,
    classes: Sequence[str],
    counts: dict[str, tuple[int, ...]],
    rejected: Sequence[tuple[str, str]],
    refused: Path | None,
) -> None:
    """Apply the policy on bad images; refuse data in which they leave a class without training images."""
    count = f"{len(rejected)} bad image{'' if len(rejected) == 1 else 's'}"
    bare = [name for name, n in zip(classes, counts["train"], strict=True) if n == 0]
    bare += [f"{split} split" for split in SPLITS if sum(counts[split]) == 0]
    listed = "".join(f"\n  {path}: {reason}" for path, reason in sorted(rejected)[:_SHOWN])
    if len(rejected) > _SHOWN:
        listed += f"\n  and {len(rejected) - _SHOWN} more"
    if refused and rejected and (bare or config.bad_images == "fail"):
        _write_rejected(refused, rejected)
        listed += f"\n{refused} has the whole list"
    if rejected and config.bad_images == "fail":
        raise UserError(f"{count} (data.bad_images: drop would leave them out):{listed}")
    if rejected:
        print(f"preprocess: {count} left out, see rejected.csv", file=sys.stderr)
    if bare:
        raise UserError(f"nothing left in {', '.join(bare)} without {count}:{listed}")


def _statistics(tally: _Tally, pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel in [0, 1], from exact sums."""
    mean = tuple(s / (pixels * 255) for s in tally.sums)
    variance = ((pixels * q - s * s) / pixels**2 for s, q in zip(tally.sums, tally.squares, strict=True))
    # A channel of one flat value would divide by zero: one grey level is the least that can vary.
    return mean, tuple(max(math.sqrt(v), 1.0) / 255 for v in variance)


def _write_rejected(path: Path, rejected: Sequence[tuple[str, str]]) -> None:
    # A byte of a name that is not UTF-8 is written as \udc and its two hexadecimal digits.
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason"))
        writer.writerows(sorted(rejected))
