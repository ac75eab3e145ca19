"""From packed splits to batches: on the training device where they fit, else through the memory map.

The order of images and their augmentation are pure functions of (seed, epoch, batch), so that training can
go on at any batch and repeats itself to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cnn_tuning.config import Recipe
from cnn_tuning.data.augment import augment
from cnn_tuning.data.packed import Meta, PackedData, PackedSplit

# A data set may take this share of the device's free memory to be kept there.
RESIDENT_SHARE = 0.25
_MASK = 2**64 - 1


class Purpose(IntEnum):
    """What random numbers are for: the first part of every key, so that no two purposes share a stream."""

    ORDER = 1
    AUGMENTATION = 2
    DROPOUT = 3
    PARTS = 4


def seed_of(purpose: Purpose, *key: int) -> int:
    """Return a seed (63 bits) that is a pure function of a purpose and some integers.

    Each step is one of SplitMix64 (Steele, Lea and Flood 2014): a microsecond, where NumPy's SeedSequence
    takes fifty, in every training step.
    """
    state = 0
    for part in (purpose, *key):
        state = (state + part + 1) * 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seeded(purpose: Purpose, *key: int) -> torch.Generator:
    """Return a generator that is a pure function of a purpose and some integers."""
    return torch.Generator().manual_seed(seed_of(purpose, *key))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits `count` images."""
    return torch.randperm(count, generator=seeded(Purpose.ORDER, seed, epoch))


def sequential_order(count: int, seed: int, epoch: int, parts: int, epochs: int) -> Tensor:
    """Return the order of an epoch where `parts` of the images are learnt one after the other.

    All `epochs` passes over the first part come first, then all over the second: as many updates as in joint
    training. The parts are random and of equal size; fewer than `parts` images may be left over, unvisited.
    """
    size = count // parts
    members = torch.randperm(count, generator=seeded(Purpose.PARTS, seed)).split(size)
    passes = range(epoch * parts, (epoch + 1) * parts)
    return torch.cat([members[number // epochs][epoch_order(size, seed, number)] for number in passes])


@dataclass(frozen=True)
class Share:
    """What one of `world` processes has of each batch: every `world`-th image from its `rank` on."""

    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> slice:
        """Return its positions within a batch."""
        return slice(self.rank, None, self.world)


WHOLE = Share()


class _Rows(Dataset):
    """Whole batches of a memory map, by positions; a worker maps the file itself instead of receiving it."""

    def __init__(self, split: PackedSplit, batches: list[np.ndarray]) -> None:
        self.images, self.labels, self.batches = split.images, split.labels, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor]:
        rows = self.batches[batch]
        ascending = np.argsort(rows)  # the disk is read forwards, the batch keeps its order
        images = np.empty((len(rows), *self.images.shape[1:]), self.images.dtype)
        images[ascending] = self.images[rows[ascending]]
        return torch.from_numpy(images), torch.from_numpy(self.labels[rows])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if isinstance(self.images, np.memmap) and self.images.filename is not None:
            state["images"] = str(self.images.filename)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], str):
            state["images"] = np.load(state["images"], mmap_mode="r")
        self.__dict__.update(state)


class Batches:
    """Batches of the images at `rows` of a split (all by default); the last, smaller batch is kept.

    In training each epoch has its own order, and batches come augmented; `begin_at` makes the next iteration start
    inside an epoch. Of several processes each gets its share of every batch, as it is within the whole batch. One
    image has no variance to normalise by: a last batch of fewer than two for each process joins the one before.
    """

    def __init__(
        self,
        split: PackedSplit,
        recipe: Recipe,
        device: torch.device,
        *,
        resident: bool,
        train: bool,
        rows: np.ndarray | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.split, self.recipe, self.device = split, recipe, device
        self.train = train
        self.batch_size = recipe.trainer.batch_size if train else recipe.trainer.eval_batch_size
        self.rows = torch.arange(len(split.labels)) if rows is None else torch.from_numpy(rows)
        # What is measured is divided once, not batch by batch: nothing depends on which images come together.
        self.share = share if train else WHOLE
        if not train:
            self.rows = self.rows[share.rows]
        self.epoch, self.first = 0, 0
        self.images: Tensor | None = None
        if resident:
            self.images = torch.from_numpy(np.array(split.images[self.rows.numpy()])).to(device)
            self.labels = torch.from_numpy(np.array(split.labels[self.rows.numpy()])).to(device)

    def __len__(self) -> int:
        full, left = divmod(self._count(), self.batch_size)
        return full + (left > 0) - self._joins(full, left)

    def size_of(self, batch: int) -> int:
        """Return how many images a batch of an epoch has, those of all processes together."""
        before = batch * self.batch_size
        return self._count() - before if batch == len(self) - 1 else self.batch_size

    def _count(self) -> int:
        parts = self.recipe.trainer.sequential_parts if self.train else 1
        return len(self.rows) // parts * parts

    def _joins(self, full: int, left: int) -> bool:
        return self.train and 0 < left < 2 * self.share.world and full > 0

    def begin_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration give `epoch` from `batch` on."""
        self.epoch, self.first = epoch, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, first = self.epoch, self.first
        self.epoch, self.first = epoch + 1, 0
        for position, (images, labels) in enumerate(self._from(epoch, first), start=first):
            if self.train:
                generator = seeded(Purpose.AUGMENTATION, self.recipe.seed, epoch, position)
                images = augment(images, self.recipe.augment, generator, self.size_of(position), self.share.rows)
            yield images, labels

    def _from(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.rows)
        return self._read(self._order(count, epoch) if self.train else torch.arange(count), first)

    def _order(self, count: int, epoch: int) -> Tensor:
        seed, parts = self.recipe.seed, self.recipe.trainer.sequential_parts
        if parts == 1:
            return epoch_order(count, seed, epoch)
        return sequential_order(count, seed, epoch, parts, self.recipe.trainer.max_epochs)

    def _read(self, order: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = list(order.split(self.batch_size))
        if self._joins(len(batches) - 1, len(batches[-1]) % self.batch_size):
            batches[-2:] = [torch.cat(batches[-2:])]
        batches = [chosen[self.share.rows] for chosen in batches[first:]]
        if self.images is not None:
            for chosen in batches:
                on_device = chosen.to(self.device, non_blocking=True)
                yield self.images.index_select(0, on_device), self.labels.index_select(0, on_device)
            return
        dataset = _Rows(self.split, [self.rows[chosen].numpy() for chosen in batches])
        pin = self.device.type == "cuda"
        workers = self.recipe.trainer.workers
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin)
        for images, labels in loader:
            yield images.to(self.device, non_blocking=pin), labels.to(self.device, non_blocking=pin)


class SplitData(Protocol):
    """Splits by name: prepared pictures, or features in their place."""

    @property
    def meta(self) -> Meta:
        """Return what the data are."""

    def split(self, name: str) -> PackedSplit:
        """Return train or val."""


class DataModule(pl.LightningDataModule):
    """The training split to learn from; parts of training and validation to measure on the same footing."""

    def __init__(
        self, data: SplitData, recipe: Recipe, device: torch.device, share: Share = WHOLE, beside: int = 1
    ) -> None:
        """Take a process's share; `beside` processes keep theirs in this machine's memory."""
        super().__init__()
        self.meta = data.meta
        val = data.split("val")
        wanted = recipe.trainer.train_eval_samples or len(val.labels)
        self.train: Batches
        if recipe.trainer.stream is None:
            train = data.split("train")
            resident = _fits(train, val, recipe, device, beside)
            self.train = Batches(train, recipe, device, resident=resident, train=True, share=share)
            rows = _stratified_rows(train.labels, min(wanted, len(train.labels)), recipe.seed)
        else:
            from cnn_tuning.data.stream import StreamedBatches, open_shards, sample

            assert isinstance(data, PackedData)
            shards = open_shards(recipe, data, beside)
            self.train = StreamedBatches(shards, data, recipe, device, share)
            # The shards are of chance: some of them show what a stratified part would.
            train = sample(shards, data, recipe.seed, wanted)
            resident, rows = _fits(train, val, recipe, device, beside), np.arange(len(train))
        self.train_part = Batches(train, recipe, device, resident=resident, train=False, rows=rows, share=share)
        self.val = Batches(val, recipe, device, resident=resident, train=False, share=share)

    def train_dataloader(self) -> Batches:
        """Return the batches to learn from."""
        return self.train

    def val_dataloader(self) -> list[Batches]:
        """Return what is measured after each epoch: a part of the training split, then validation."""
        return [self.train_part, self.val]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is: `Batches` gives it on the device."""
        return batch


def training_images(data: SplitData, recipe: Recipe, count: int) -> PackedSplit:
    """Return the training split; where it is streamed, so many images of it, the same ones each time."""
    if recipe.trainer.stream is None or not isinstance(data, PackedData):
        return data.split("train")
    from cnn_tuning.data.stream import open_shards, sample

    return sample(open_shards(recipe, data), data, recipe.seed, count)


def _fits(train: PackedSplit, val: PackedSplit, recipe: Recipe, device: torch.device, beside: int) -> bool:
    if recipe.trainer.data_on_device != "auto":
        return recipe.trainer.data_on_device == "yes"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available // beside
    return train.images.nbytes + val.images.nbytes < RESIDENT_SHARE * free


def _stratified_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` positions with the class shares of all, the same for the same seed."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    if count == len(rows):
        return rows
    counts = np.bincount(labels)
    classes = np.count_nonzero(counts)
    enough = min(count, len(rows) - count) >= classes and counts[counts > 0].min() >= 2
    stratify = labels if enough else None
    return np.sort(train_test_split(rows, train_size=count, random_state=seed, stratify=stratify)[0])
