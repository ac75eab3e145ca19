"""What a frozen backbone makes of pictures, computed once: network and data in, features in place of pictures out.

They are kept below `.state/features/KEY`, where KEY stands for everything that decides them: the trunk's
weights, the prepared data, how they are computed and the code. All heads, arms and trials share them; a lock
lets one process compute while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from cnn_tuning.config import AugmentConfig, Recipe
from cnn_tuning.data.packed import Meta, PackedData, PackedSplit
from cnn_tuning.models.backbone import Backbone, feature_count
from cnn_tuning.models.network import Network
from cnn_tuning.training.resume import code_digest
from cnn_tuning.training.start import say_once

# Below the project's folder, in which every command runs.
FOLDER = Path(".state/features")
SPLITS = ("train", "val")
BATCH = 64
TOLD_EVERY_S = 30.0
NOTED_EVERY_S = 10.0
DONE = "done"
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class FeatureData:
    """Prepared data whose `images` are features: float32, N×F, read-only memory maps."""

    meta: Meta
    splits: dict[str, PackedSplit]

    def split(self, name: str) -> PackedSplit:
        """Return train or val."""
        return self.splits[name]


class HeadNetwork(Network):
    """The head of a backbone on its own: features in, logits out; its weights have the whole network's names."""

    def __init__(self, head: nn.Module) -> None:
        nn.Module.__init__(self)
        self.body = Backbone(nn.Identity(), head)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for features N×F."""
        return self.body(images)


def uses_cache(recipe: Recipe) -> bool:
    """Tell whether the recipe trains on features; why it does not is said once, where one might expect it to."""
    finetune = recipe.trainer.finetune
    if finetune is None or finetune.trainable != "head" or finetune.cache_features == "no":
        return False
    if recipe.augment != AugmentConfig(recipe.augment.name):
        say_once(
            f"augment: {recipe.augment.name} changes each picture in each epoch, so the frozen backbone's "
            "features are computed anew every time; augment: none computes them once"
        )
        return False
    if recipe.trainer.stream is not None:
        say_once("trainer.stream: the frozen backbone's features are computed anew every time, not kept")
        return False
    return True


def features_of(
    recipe: Recipe, data: PackedData, network: Network, device: torch.device, precision: str, name: str
) -> FeatureData:
    """Return the data as the features that the network's trunk gives, from the cache or computed now.

    The trunk of `network` is frozen. `name` begins what is told.
    """
    key = _key(recipe, data.meta, network, device, precision)
    kept = FOLDER / key
    if not kept.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with _alone(FOLDER / f"{key}.lock", name):
            if not kept.is_dir():
                _compute(recipe, data, network.to(device), device, precision, kept, name)
    splits = {}
    for split in SPLITS:
        features = np.load(kept / f"{split}.npy", mmap_mode="r")
        splits[split] = PackedSplit(features, data.split(split).labels)
    return FeatureData(data.meta, splits)


def _key(recipe: Recipe, meta: Meta, network: Network, device: torch.device, precision: str) -> str:
    backbone = network.body
    weights = hashlib.sha256()
    for name, tensor in [*network.named_buffers(recurse=False), *backbone.trunk.state_dict().items()]:
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    facts = {
        "weights": weights.hexdigest(),
        "network": {k: v for k, v in recipe.model.arguments.items() if k != "units"},
        "data": meta.digest,
        "code": code_digest(),
        "device": device.type,
        "precision": precision,
        "channels_last": recipe.trainer.channels_last,
        "threads": torch.get_num_threads(),  # they decide the last bits
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Hold a lock; say so where another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: another process computes the backbone's features: waiting for them", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compute(
    recipe: Recipe,
    data: PackedData,
    network: Network,
    device: torch.device,
    precision: str,
    kept: Path,
    name: str,
) -> None:
    """Write the features of both splits, going on where an interrupted process was.

    The folder appears when all is there.
    """
    partial = kept.with_suffix(".partial")
    sizes = {split: sum(data.meta.counts[split]) for split in SPLITS}
    done = _opened(partial, sizes, feature_count(network.body.trunk))
    features = {split: np.load(partial / f"{split}.npy", mmap_mode="r+") for split in SPLITS}
    torch.use_deterministic_algorithms(recipe.trainer.deterministic, warn_only=True)
    began = noted = time.monotonic()
    total = sum(sizes.values())
    with _progress(name, total, done) as advance:
        for split, start, before in _blocks(sizes, done):
            batch = torch.from_numpy(np.array(data.split(split).images[start : start + BATCH])).to(device)
            features[split][start : start + BATCH] = _forward(network, batch, precision).cpu().numpy()
            advance(len(batch))
            if time.monotonic() - noted > NOTED_EVERY_S:
                noted = time.monotonic()
                _note(partial, features, before + len(batch))
    _note(partial, features, total)
    del features
    (partial / DONE).unlink()
    partial.rename(kept)
    seconds = time.monotonic() - began
    print(f"{name}: features of {total:,} pictures in {seconds:.1f} s, kept in {kept}", file=sys.stderr)


def _blocks(sizes: dict[str, int], done: int) -> Iterator[tuple[str, int, int]]:
    """Give (split, first position in it, pictures before it in all) for what is not done yet."""
    before = 0
    for split, count in sizes.items():
        yield from ((split, at, before + at) for at in range(0, count, BATCH) if before + at >= done)
        before += count


def _opened(partial: Path, sizes: dict[str, int], width: int) -> int:
    """Make the files of a folder, unless they are there, and return how many pictures are done."""
    try:
        return int((partial / DONE).read_text())
    except (FileNotFoundError, ValueError):
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for split, count in sizes.items():
        open_memmap(partial / f"{split}.npy", mode="w+", dtype=np.float32, shape=(count, width)).flush()
    return 0


def _note(partial: Path, features: dict[str, np.memmap], done: int) -> None:
    """Write down that so many pictures are done, after their features."""
    for written in features.values():
        written.flush()
    (partial / f"{DONE}.new").write_text(str(done))
    (partial / f"{DONE}.new").replace(partial / DONE)


@torch.no_grad()
def _forward(network: Network, images: Tensor, precision: str) -> Tensor:
    dtype = _DTYPES.get(precision)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return network.body.trunk(network.normalised(images)).float()


@contextmanager
def _progress(name: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show how far it is and the time left: a bar on a terminal, a line now and then in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task(f"{name}: features", total=total, completed=done)
            yield lambda count: progress.advance(task, count)
        return
    began = told = time.monotonic()
    first = done

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told > TOLD_EVERY_S:
            told = now
            left = (now - began) * (total - done) / (done - first)
            print(f"{name}: features of {done:,} of {total:,} pictures, {left:.0f} s left", file=sys.stderr)

    yield advance
