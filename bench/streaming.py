"""Streaming shards from S3 against the memory map: images/s, peak memory and cache as the set grows tenfold.

    python bench/streaming.py [--images 8000] [--side 64] [--growth 10] [--libraries]

Synthetic RGB images, SeaweedFS as S3 on this machine. Each arm is a process of its own that reads an epoch in
batches of 256 without augmentation, with one thread of torch; memory is the peak of the process and of its
children's own less what it had before (pages of a memory map count, though the system may take them back), cache
the most that lay on the disk. `resumes`: begun anew at three quarters of the
epoch, it gives the same batches as before, the first of them after so many seconds. `--libraries` reads with
webdataset (which must be installed) and with LitData's own loader, shuffle and state, too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
BATCH, SHARD_MB, CACHE_GB = 256, 8.0, 0.064
OURS = ("memory map", "folder", "s3")
LIBRARIES = ("webdataset", "litdata")

HEAD = f"{'':12}{'images/s':>10}{'ratio':>8}{'memory MB':>11}{'cache MB':>10}{'resumes':>9}{'after s':>9}"


def make(folder: Path, count: int, side: int) -> None:
    """Write a prepared training split of random images, one block at a time."""
    from cnn_tuning.config import ImageConfig
    from cnn_tuning.data.packed import Meta

    (folder / "train").mkdir(parents=True)
    shape = (count, 3, side, side)
    images = np.lib.format.open_memmap(folder / "train/images.npy", "w+", np.uint8, shape)
    rng = np.random.default_rng(0)
    for start in range(0, count, 1000):
        images[start : start + 1000] = rng.integers(0, 256, images[start : start + 1000].shape, dtype=np.uint8)
    images.flush()
    np.save(folder / "train/labels.npy", np.arange(count) % 10)
    counts = {"train": tuple(np.bincount(np.arange(count) % 10).tolist())}
    image = ImageConfig(size=(side, side), channels=3)
    digests = {"train": f"{count:064x}"}
    meta = Meta("bench", tuple("0123456789"), image, counts, (0.5,) * 3, (0.3,) * 3, images.nbytes, 0, {}, digests)
    (folder / "meta.json").write_text(meta.to_json())


def write_tars(data: Path, prefix: str) -> None:
    """Put the training split into S3 in webdataset's form: of each image two files in a tar."""
    import boto3
    import webdataset as wds
    from seaweed import BUCKET

    from cnn_tuning.data.packed import PackedData

    split = PackedData.open(data).split("train")
    with tempfile.TemporaryDirectory() as scratch:
        with wds.ShardWriter(f"{scratch}/%05d.tar", maxsize=SHARD_MB * 1e6, maxcount=1e9, verbose=0) as sink:
            for row in np.random.default_rng(0).permutation(len(split)).tolist():
                label = str(split.labels[row]).encode()
                sink.write({"__key__": f"{row:08}", "img": split.images[row].tobytes(), "cls": label})
        for file in Path(scratch).iterdir():
            boto3.client("s3").upload_file(str(file), BUCKET, f"{prefix}/{file.name}")


@functools.cache
def plain_recipe():
    """Return a recipe without augmentation."""
    from training_recipes import recipe_with

    return recipe_with(["augment=none"])


def batches_of(arm: str, place: Path, first: int) -> Iterable:
    """Return an epoch's batches from `first` on, as each arm can."""
    from seaweed import BUCKET

    uri = f"s3://{BUCKET}/{place.name}"
    if arm == "webdataset":
        return _webdataset(uri, place, first)
    if arm == "litdata":
        return _litdata(uri, place, first)
    import torch

    from cnn_tuning.config import patch
    from cnn_tuning.data.batches import Batches
    from cnn_tuning.data.packed import PackedData

    stream = {"memory map": None, "folder": str(place / "shards"), "s3": f"{uri}/shards"}[arm]
    changes = {"batch_size": BATCH, "stream": stream, "stream_cache_gb": CACHE_GB, "workers": 0}
    recipe = patch(plain_recipe(), {f"trainer.{name}": value for name, value in changes.items()})
    data, cpu = PackedData.open(place / "data"), torch.device("cpu")
    batches: Batches
    if stream is None:
        batches = Batches(data.split("train"), recipe, cpu, resident=False, train=True)
    else:
        from cnn_tuning.data.stream import StreamedBatches, open_shards

        batches = StreamedBatches(open_shards(recipe, data), data, recipe, cpu)
    batches.begin_at(0, first)
    return batches


def _webdataset(uri: str, place: Path, first: int) -> Iterable:
    import boto3
    import torch
    import webdataset as wds

    side = json.loads((place / "data/meta.json").read_text())["image"]["size"][0]
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/tars/")["Contents"]
    signed = [
        client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": one["Key"]}, ExpiresIn=9999)
        for one in found
    ]

    def decode(sample: dict) -> tuple[torch.Tensor, int]:
        image = np.frombuffer(sample["img"], np.uint8).reshape(3, side, side)
        return torch.from_numpy(image.copy()), int(sample["cls"])

    urls = [f"pipe:curl -s '{url}'" for url in signed]
    dataset = wds.WebDataset(urls, shardshuffle=100, seed=0, empty_check=False).shuffle(1000).map(decode)
    # It has no place to go on from: what was seen is read again and thrown away.
    return itertools.islice(iter(dataset.batched(BATCH)), first, None)


def _litdata(uri: str, place: Path, first: int) -> Iterable:
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_AVAILABLE = False  # it refuses plain http: boto3 instead
    dataset = litdata.StreamingDataset(
        f"{uri}/shards",
        cache_dir=str(place / ".state"),
        shuffle=True,
        seed=0,
        item_shuffle_window=0,
        batch_decode=0,
        max_cache_size=f"{CACHE_GB * 1000:.0f}MB",
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=_together)
    if first:
        loader.load_state_dict(json.loads((place / "state.json").read_text()))
        return loader
    return _saving(loader, place)


def _together(items: list[bytes]) -> list[np.ndarray]:
    rows = np.frombuffer(b"".join(items), np.uint8).reshape(len(items), -1)
    return [rows[:, :-8].reshape(len(items), 3, -1, 1), rows[:, -8:]]


def _saving(loader, place: Path) -> Iterator:
    count = len(loader)
    for number, batch in enumerate(loader):
        yield batch
        if number + 1 == count * 3 // 4:
            (place / "state.json").write_text(json.dumps(loader.state_dict()))


def peak_mb() -> float:
    """Return this process's peak memory; `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Watch(threading.Thread):
    """Looks ten times a second at how much lies in the cache, and at the memory of child processes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.cache, self.children, self.done = folder, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            sizes = 0
            for top, _, names in os.walk(self.folder):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        sizes += os.stat(f"{top}/{name}").st_size  # noqa: PTH116 - of many, often
            self.cache = max(self.cache, sizes)
            memory = 0
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    memory += one.memory_info().rss - one.memory_info().shared
            self.children = max(self.children, memory)


def child(arm: str, place: Path) -> None:
    """Read an epoch, then resume, and print the figures."""
    import torch

    if arm in LIBRARIES:  # LitData with its own downloader
        import litdata  # noqa: F401
    else:
        from cnn_tuning.data import batches, stream  # noqa: F401 - what is imported is no memory of the data
    plain_recipe()
    torch.set_num_threads(1)
    watch, before = Watch(place / ".state"), peak_mb()
    watch.start()
    began = time.perf_counter()
    seen, images = [], 0
    for batch in batches_of(arm, place, 0):
        seen.append(hash(np.ascontiguousarray(batch[0]).tobytes()))
        images += len(batch[0])
    seconds = time.perf_counter() - began
    memory = peak_mb() - before + watch.children / 2**20
    figures = {"images": images, "images_per_s": images / seconds, "memory_mb": memory}
    first = len(seen) * 3 // 4
    began = time.perf_counter()
    rest, waited = [], 0.0
    for batch in batches_of(arm, place, first):
        waited = waited or time.perf_counter() - began
        rest.append(hash(np.ascontiguousarray(batch[0]).tobytes()))
    watch.done.set()
    figures |= {"resumes": rest == seen[first:], "resume_s": waited, "cache_mb": watch.cache / 1e6}
    print(json.dumps(figures))


def measure(arm: str, place: Path) -> dict:
    """Run an arm in a process of its own."""
    words = [sys.executable, __file__, "--child", arm, "--place", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=place)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line] or ["it failed"]
        return {"error": told[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def build(place: Path, count: int, side: int, libraries: bool) -> None:
    """Make the data in every form."""
    from seaweed import BUCKET

    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.data.shards import write_shards

    place.mkdir()
    make(place / "data", count, side)
    data = PackedData.open(place / "data")
    began = time.perf_counter()
    index = write_shards(data, f"s3://{BUCKET}/{place.name}/shards", SHARD_MB)
    size, seconds = sum(index.bytes) / 1e6, time.perf_counter() - began
    print(f"\n{count} images, {size:.0f} MB in {len(index.sizes)} shards, written at {size / seconds:.0f} MB/s")
    write_shards(data, str(place / "shards"), SHARD_MB)
    if libraries:
        write_tars(place / "data", f"{place.name}/tars")


def main() -> None:
    """Measure every arm on the small and the large set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--growth", type=int, default=10, help="1: the small set only")
    parser.add_argument("--libraries", action="store_true")
    parser.add_argument("--arm", help="This one only, beside the memory map.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.place)
        return
    from seaweed import Seaweed

    arms = ("memory map", asked.arm) if asked.arm else OURS + (LIBRARIES if asked.libraries else ())
    with tempfile.TemporaryDirectory(prefix="streaming-") as name:
        server = Seaweed(Path(name) / "s3").start()
        os.environ.update(server.environment)
        try:
            for factor in dict.fromkeys((1, asked.growth)):
                place, count = Path(name) / f"times-{factor}", asked.images * factor
                build(place, count, asked.side, asked.libraries)
                print(HEAD)
                reference = 0.0
                for arm in arms:
                    one = measure(arm, place)
                    reference = reference or one.get("images_per_s", 0.0)
                    show(arm, one, reference, count)
        finally:
            server.kill()


def show(arm: str, one: dict, reference: float, count: int) -> None:
    """Print an arm's row; `reference`: what its images/s are to be compared with."""
    if "error" in one:
        print(f"{arm:12}{one['error']}", flush=True)
        return
    rate, same = one["images_per_s"], "same" if one["resumes"] else "other"
    line = f"{arm:12}{rate:10.0f}{rate / reference:8.2f}{one['memory_mb']:11.0f}{one['cache_mb']:10.0f}{same:>9}"
    whole = "" if one["images"] == count else f"  {one['images']} images"
    print(f"{line}{one['resume_s']:9.2f}{whole}", flush=True)


if __name__ == "__main__":
    main()
