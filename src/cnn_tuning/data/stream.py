"""From shards to batches, where data are larger than memory or disk: LitData reads, `Batches`' interface goes out.

LitData's `StreamingDataset` fetches shards ahead, keeps the cache within its bound, decodes, and goes on within an
epoch. Four of its parts are replaced, at the places that it has for that or by a class of the same shape:

- Its shuffle by `Order`: its own depends on the number of processes and workers, and drops images so that all
  processes get as many batches. Here each image comes once, and what a process gets is a pure function of
  (seed, epoch, number of processes).
- Its S3 downloader by `Fetch`: its own (obstore) refuses plain-http endpoints, knows no checksum and tries for
  three minutes. Here it is boto3, as everywhere in the project, and a shard is verified.
- How its thread keeps the cache within its bound, by `Ahead`: its own waits for room that only the reader would
  make, who waits for a shard (seen with a small cache and a slow S3). Here no more shards are fetched ahead than
  may lie there, and one that has been read goes at once.
- Its bookkeeping between processes by none: each has a cache of its own, as it reads its own shards.

Its state in mid-epoch is in no checkpoint: it follows from (epoch, batch), as everything in `Batches` does. It
calls nothing outside: its look for updates is off by default, its cloud parts need a package that is not here.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from litdata.streaming import StreamingDataset, reader
from litdata.streaming.cache import Cache
from litdata.streaming.config import ChunksConfig
from litdata.streaming.downloader import Downloader, register_downloader
from litdata.streaming.reader import PrepareChunksThread
from litdata.streaming.resolver import Dir
from litdata.streaming.shuffle import Shuffle
from litdata.utilities.env import _DistributedEnv
from torch import Tensor

from cnn_tuning.config import Recipe
from cnn_tuning.data.batches import WHOLE, Batches, Purpose, Share, seeded
from cnn_tuning.data.digests import sha256_of
from cnn_tuning.data.packed import PackedData, PackedSplit
from cnn_tuning.data.shards import INDEX, LABEL_BYTES, REMEDY, Bucket, Folder, Index, Place, index_for, place_of
from cnn_tuning.errors import UserError

# Below the project's folder, in which every command runs.
FOLDER = Path(".state/stream")
BATCHES_AHEAD = 3
# One that is read, and two that come.
LEAST_SHARDS = 3
_ANY = 2**62  # bytes: LitData is to remove nothing
# Fetched ahead at most.
AT_ONCE = 32
_own: list[weakref.finalize] = []

logging.getLogger("litdata").setLevel(logging.ERROR)


class Order(Shuffle):
    """What a process reads in an epoch: images `begin` to `end` of the shards in an order of chance."""

    def __init__(self, cache: Cache, key: tuple[Purpose, int, int], begin: int, end: int, *, keep: bool) -> None:
        super().__init__(cache, 0, False)
        self.key, self.begin, self.end = key, begin, end
        self.node_shard_fits = keep  # asked by LitData: nothing need ever be removed

    def get_chunks_and_intervals_per_workers(self, *_: Any) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Return the shards to read, and of each the part, between where the shard begins and ends."""
        intervals = self.cache.get_chunk_intervals()
        chunks, parts, before = [], [], 0
        for chunk in torch.randperm(len(intervals), generator=seeded(*self.key)).tolist():
            start, _, _, stop = intervals[chunk]
            low, high = max(self.begin - before, 0), min(self.end - before, stop - start)
            if low < high:
                chunks.append(chunk)
                parts.append([start, start + low, start + high, stop])
            before += stop - start
        return [chunks], [parts]

    def __call__(self, array: np.ndarray, num_chunks: int, current_epoch: int, chunk_index: int) -> list[int]:
        """Return a part's images in an order of chance."""
        return array[torch.randperm(len(array), generator=seeded(*self.key, chunk_index)).numpy()].tolist()


class Fetch(Downloader):
    """Brings a shard from S3 in one step; its name says what is in it."""

    def download_file(self, remote_chunkpath: str, local_chunkpath: str) -> None:
        """Download unless it is there; raises `UserError` where it is missing or altered."""
        target = Path(local_chunkpath)
        if target.exists():
            return
        partial = Path(self._temp_download_path(local_chunkpath))
        self._storage_options["place"].fetch(target.name, partial)
        if target.name != f"chunk-{sha256_of(partial)[:32]}.bin":
            partial.unlink()
            raise UserError(f"{remote_chunkpath} is damaged (its SHA-256 is not in its name): {REMEDY}")
        self._publish_file(str(partial), local_chunkpath)


class Ahead(PrepareChunksThread):
    """Fetches shards in their order, as many as may lie in the cache, and removes each when the next is begun."""

    def __init__(self, config: ChunksConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self._max_pre_download = config._storage_options["room"]

    def _slot_budget_enabled(self) -> bool:
        return False

    def _can_delete_chunk(self) -> bool:
        return self._delete_chunks_when_processed

    def _force_download(self, timeout: float = 0.0) -> None:
        """Do nothing for a reader that waits long: its shard is on the way, and would be counted twice."""

    def _report_crash(self, exc: BaseException) -> None:
        """Print no traceback: where the shard is waited for, the error is raised."""


register_downloader("s3://", Fetch, overwrite=True)
reader.PrepareChunksThread = Ahead


class Ordered(StreamingDataset):
    """LitData's dataset in the order that it is given, as the only reader of its cache."""

    def __init__(self, where: Dir, place: Place, room: int, order: dict[str, Any]) -> None:
        options = {"place": place, "room": room}  # for `Fetch` and `Ahead`
        most = _ANY if order["keep"] else 1
        super().__init__(where, shuffle=True, max_cache_size=most, batch_decode=0, storage_options=options)
        self.order = order
        self.distributed_env = _DistributedEnv(1, 0, 1)

    def _create_shuffler(self, cache: Cache) -> Order:
        return Order(cache, **self.order)

    def begin_at(self, item: int) -> None:
        """Let the next iteration start inside the epoch."""
        if item:
            self.load_state_dict(self.state_dict(item, num_workers=1, batch_size=1))

    def let_go(self) -> None:
        """End what fetches ahead."""
        thread = self.cache._reader._prepare_thread if self.cache else None
        if thread is not None:
            thread.force_stop()
            thread.join()


class Shards:
    """The shards of a place with the part of them that is on this disk, in a folder that is this object's own."""

    def __init__(self, place: Folder | Bucket, index: Index, cache_gb: float) -> None:
        """Make the folder; raises `UserError` where `cache_gb` is too little for these shards."""
        self.place, self.index = place, index
        limit = cache_gb * 1e9
        self.keep = isinstance(place, Folder) or sum(index.bytes) <= limit
        self.room = AT_ONCE if self.keep else int(limit / max(index.bytes))
        if self.room < LEAST_SHARDS:
            needed = LEAST_SHARDS * max(index.bytes) / 1e9
            raise UserError(
                f"trainer.stream_cache_gb: {cache_gb:g} is too little for the shards of {place.uri}: "
                f"{LEAST_SHARDS} of them take {needed:.3g}; or write smaller ones (--shard-mb)"
            )
        self.room = min(self.room, AT_ONCE)
        if isinstance(place, Folder):  # read where they are
            self.where = Dir(path=str(place.path.resolve()))
        else:
            folder = _own_folder(self)
            (folder / INDEX).write_text(index.text, encoding="utf-8")
            self.where = Dir(path=str(folder), url=place.uri)

    def items(
        self, key: tuple[Purpose, int, int], begin: int, end: int, first: int = 0
    ) -> Generator[bytes, None, None]:
        """Yield images with their labels in the order of `Order`, from the `first` on."""
        self._forget()
        order = {"key": key, "begin": begin, "end": end, "keep": self.keep}
        dataset = Ordered(Dir(self.where.path, self.where.url), self.place, self.room, order)
        dataset.begin_at(first)
        try:
            yield from dataset
        except RuntimeError as error:
            if isinstance(error.__cause__, UserError | OSError):  # LitData's word for what its thread met
                raise error.__cause__ from None
            raise
        except (FileNotFoundError, TimeoutError) as error:
            raise UserError(f"{self.place.uri}: {error}: {REMEDY}") from None
        finally:
            dataset.let_go()

    def _forget(self) -> None:
        """Remove what an iteration that was broken off has left, for which LitData would find no room."""
        if not self.keep:
            assert self.where.path is not None
            for file in Path(self.where.path).iterdir():
                if file.name != INDEX:
                    file.unlink(missing_ok=True)


def _own_folder(owner: object) -> Path:
    """Make a folder that goes with its owner; one whose process was killed goes when the next is made."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / "lock"):
        for left in FOLDER.glob("*.lock"):
            lock = FileLock(left)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue  # its process lives
            _remove(left.with_suffix(""), lock, os.getpid())
        folder = Path(tempfile.mkdtemp(dir=FOLDER)).resolve()
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    _own.append(weakref.finalize(owner, _remove, folder, lock, os.getpid()))
    return folder


def forget() -> None:
    """Remove this process's folders, where it is to leave without an ordinary exit."""
    for remove in _own:
        remove()


def _remove(folder: Path, lock: FileLock, process: int) -> None:
    if os.getpid() != process:  # a worker that was forked from its owner
        return
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # else something is still written there: the next to come removes it
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def open_shards(recipe: Recipe, data: PackedData, beside: int = 1) -> Shards:
    """Open `trainer.stream`; `beside` processes of this machine share the cache's size.

    Raises:
        UserError: there are no shards, they are of other data, or the cache is too small for them.
    """
    assert recipe.trainer.stream is not None
    place = place_of(recipe.trainer.stream)
    index = index_for(place, data.meta.digests["train"], data.path)
    return Shards(place, index, recipe.trainer.stream_cache_gb / beside)


def sample(shards: Shards, data: PackedData, seed: int, count: int) -> PackedSplit:
    """Return so many training images by the seed, in memory: of as few shards as hold them."""
    count = min(count, sum(shards.index.sizes))
    with closing(shards.items((Purpose.PARTS, seed, 0), 0, count)) as items:
        images, labels = _arrays(list(items), data.meta.shape)
    return PackedSplit(images, labels)


def _arrays(items: list[bytes], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(b"".join(items), np.uint8).reshape(len(items), -1)
    labels = np.ascontiguousarray(rows[:, -LABEL_BYTES:]).view("<i8")[:, 0]
    return np.ascontiguousarray(rows[:, :-LABEL_BYTES]).reshape(len(items), *shape), labels.astype(np.int64)


class StreamedBatches(Batches):
    """Augmented training batches of shards; of several processes each reads its own images, as many as the others.

    Which images come together differs from the memory map, and with the number of processes.
    """

    def __init__(
        self, shards: Shards, data: PackedData, recipe: Recipe, device: torch.device, share: Share = WHOLE
    ) -> None:
        """Look at the shards; raises `UserError` where the recipe needs all data at hand."""
        if recipe.trainer.sequential_parts > 1:
            raise UserError("trainer.sequential_parts needs the data at hand: set trainer.stream: null")
        self.shards, self.recipe, self.device, self.share = shards, recipe, device, share
        self.shape = data.meta.shape
        self.train, self.images = True, None
        self.batch_size = recipe.trainer.batch_size
        self.epoch, self.first = 0, 0

    def _count(self) -> int:
        return sum(self.shards.index.sizes)

    def _own(self, rank: int) -> tuple[int, int]:
        """Return how many images a process has of each batch but the last, and how many of that."""
        rows = slice(rank, None, self.share.world)
        return len(range(self.batch_size)[rows]), len(range(self.size_of(len(self) - 1))[rows])

    def _from(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Put batches together a few ahead, in a thread of their own."""
        pin = self.device.type == "cuda"
        ahead: deque[Future[tuple[Tensor, Tensor] | None]] = deque()
        with closing(self._assembled(epoch, first)) as batches, ThreadPoolExecutor(1, "batches") as reading:
            try:
                while True:
                    while len(ahead) < BATCHES_AHEAD:
                        ahead.append(reading.submit(next, batches, None))
                    batch = ahead.popleft().result()
                    if batch is None:
                        return
                    images, labels = (part.pin_memory() if pin else part for part in batch)
                    yield images.to(self.device, non_blocking=pin), labels.to(self.device, non_blocking=pin)
            finally:
                for waiting in ahead:
                    waiting.cancel()

    def _assembled(self, epoch: int, first: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        before = len(self) - 1
        begin, end = 0, 0
        for rank in range(self.share.rank + 1):
            full, last = self._own(rank)
            begin, end = end, end + before * full + last
        key = (Purpose.ORDER, self.recipe.seed, epoch)
        with closing(self.shards.items(key, begin, end, first * full)) as items:
            for batch in range(first, len(self)):
                size = full if batch < before else last
                images, labels = _arrays(list(itertools.islice(items, size)), self.shape)
                yield torch.from_numpy(images), torch.from_numpy(labels)
