"""Peak memory of preprocessing against the size of the data: synthetic image folders of two sizes, one run.

python bench/preprocess_memory.py [--gb 5] [--workers N] [--folder DIR]

Prints for each size the number of images, the time and the peak resident memory of the whole process tree,
and their ratios. The folders are made beside each other under a temporary one that is removed at the end.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from cnn_tuning.config import DataConfig, ImageConfig
from cnn_tuning.data.prepare import prepare

SMALL = 0.1  # of the large folder
CLASSES = 10
SIDE = 400


def make_images(folder: Path, first: int, count: int) -> int:
    """Write noisy pictures, three JPEG and one BMP of every four; return their bytes on disk."""
    rng = np.random.default_rng(first)
    smooth = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).resize((SIDE, SIDE))
    noise = np.asarray(smooth) // 2 + rng.integers(0, 128, (SIDE, SIDE, 3), dtype=np.uint8)
    total = 0
    for number in range(first, first + count):
        path = folder / f"class_{number % CLASSES}" / f"{number:07}.{'bmp' if number % 4 == 0 else 'jpg'}"
        Image.fromarray(np.roll(noise, number * 7, axis=(0, 1))).save(path, quality=95)
        total += path.stat().st_size
    return total


def make_folder(folder: Path, size: float) -> int:
    """Fill an image folder of about `size` bytes; return the number of images."""
    for label in range(CLASSES):
        (folder / f"class_{label}").mkdir(parents=True)
    sample = folder / "sample"
    for label in range(CLASSES):
        (sample / f"class_{label}").mkdir(parents=True)
    each = make_images(sample, 0, 40) / 40
    shutil.rmtree(sample)
    count = max(1000, int(size / each))  # fewer would be done without a pool
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("forkserver")) as pool:
        jobs = [pool.submit(make_images, folder, i, min(500, count - i)) for i in range(0, count, 500)]
        for job in jobs:
            job.result()
    return count


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def watch(pid: int, peak: list[int], stop: threading.Event) -> None:
    """Keep the largest sum of resident memory over a process and its descendants."""
    while not stop.wait(0.05):
        try:
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        total = 0
        for process in tree:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total)


def run(raw: Path, out: Path, workers: int) -> None:
    config = DataConfig("bench", "image_folder", {}, (), ImageConfig((64, 64), 3))
    prepare(config, raw, out, seed=0, workers=workers)


def measure(raw: Path, out: Path, workers: int) -> tuple[float, float]:
    """Return seconds and peak MiB of `prepare` in a fresh process."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=(raw, out, workers))
    peak, stop = [0], threading.Event()
    start = time.monotonic()
    process.start()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, stop))
    watcher.start()
    process.join()
    seconds = time.monotonic() - start
    stop.set()
    watcher.join()
    assert process.exitcode == 0, "prepare failed"
    return seconds, peak[0] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=5.0, help="bytes on disk of the large folder, in 10^9")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder goes")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        for size in (SMALL * arguments.gb, arguments.gb):
            raw, out = Path(work) / "raw", Path(work) / "out"
            count = make_folder(raw, size * 1e9)
            on_disk = folder_bytes(raw)
            seconds, peak = measure(raw, out, arguments.workers)
            packed = folder_bytes(out)
            rows.append((on_disk, count, seconds, peak))
            print(
                f"{on_disk / 1e9:6.2f} GB  {count:7,} images  {seconds:7.1f} s  {count / seconds:7.0f} images/s  "
                f"packed {packed / 1e6:7.1f} MB  peak {peak:6.0f} MiB",
                flush=True,
            )
            shutil.rmtree(raw)
            shutil.rmtree(out)
    (small, _, _, low), (large, _, _, high) = rows
    print(f"data ×{large / small:.1f}, peak memory ×{high / low:.2f} ({arguments.workers} workers)")


if __name__ == "__main__":
    main()
