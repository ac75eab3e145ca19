"""Prepared data on disk: `{train,val,test}/{images,labels}.npy`, `meta.json`, `rejected.csv`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn_tuning.config import ImageConfig, validate
from cnn_tuning.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says of the prepared data.

    `counts`: images of each class, by split. `mean`, `std`: per channel in [0, 1], of the training split
    only; `std` is at least 1/255. `bytes`: of all images. `sources`: SHA-256 of each raw file (of an image
    folder: one sum over paths and bytes of all images). `digests`: SHA-256 of each split's images and labels.
    """

    name: str
    classes: tuple[str, ...]
    image: ImageConfig
    counts: dict[str, tuple[int, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bytes: int
    seed: int
    sources: dict[str, str]
    digests: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.image.channels, *self.image.size)

    @property
    def digest(self) -> str:
        """The id of the prepared data: 32 hexadecimal digits over everything here."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Return the text of `meta.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Meta:
        """Read the text of `meta.json`; raises `ValueError`, `KeyError` or `TypeError` for any other."""
        tree = json.loads(text)
        return cls(
            name=tree["name"],
            classes=tuple(tree["classes"]),
            image=validate(ImageConfig, tree["image"]),
            counts={split: tuple(map(int, counts)) for split, counts in tree["counts"].items()},
            mean=tuple(map(float, tree["mean"])),
            std=tuple(map(float, tree["std"])),
            bytes=int(tree["bytes"]),
            seed=int(tree["seed"]),
            sources=dict(tree["sources"]),
            digests=dict(tree["digests"]),
        )


@dataclass(frozen=True)
class PackedSplit:
    """`images`: uint8 N×C×H×W, a read-only memory map. `labels`: int64, N."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PackedData:
    """A folder of prepared data; a split's files are opened when it is asked for, and no other's."""

    path: Path
    meta: Meta

    @classmethod
    def open(cls, path: Path) -> PackedData:
        """Read `meta.json` and nothing else."""
        path = Path(path)
        try:
            meta = Meta.from_json((path / "meta.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}/meta.json is missing: run `dvc repro preprocess` first") from None
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{path}/meta.json is damaged ({reason}): run `dvc repro -f preprocess`") from None
        return cls(path, meta)

    def split(self, name: str) -> PackedSplit:
        """Open one of train, val, test."""
        if name not in self.meta.counts:
            raise UserError(f"{self.path}: no split {name!r}; one of {', '.join(self.meta.counts)}")
        count = sum(self.meta.counts[name])
        images = _mapped(self.path / name / "images.npy", (count, *self.meta.shape), np.uint8)
        labels = _mapped(self.path / name / "labels.npy", (count,), np.int64)
        return PackedSplit(images, np.array(labels))

    def verify(self, name: str) -> None:
        """Compare a split's bytes with the digest in `meta.json`; raises `UserError` where they differ."""
        split = self.split(name)
        if digest_of(split.images, split.labels) != self.meta.digests[name]:
            raise UserError(f"{self.path}/{name} differs from meta.json: run `dvc repro -f preprocess`")


def digest_of(images: np.ndarray, labels: np.ndarray, block: int = 4096) -> str:
    """Return the SHA-256 over the images' and then the labels' bytes, reading `block` images at a time."""
    digest = hashlib.sha256()
    for start in range(0, len(images), block):
        digest.update(np.ascontiguousarray(images[start : start + block]).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


def _mapped(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    remedy = "run `dvc repro -f preprocess`"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): {remedy}") from None
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype} {array.shape}"
        raise UserError(f"{path} holds {found}, meta.json says {np.dtype(dtype)} {shape}: {remedy}")
    return array


def class_counts(labels: np.ndarray, classes: int) -> tuple[int, ...]:
    """Return how many labels each class has."""
    return tuple(int(n) for n in np.bincount(labels, minlength=classes))
