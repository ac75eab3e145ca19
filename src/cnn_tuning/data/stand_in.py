"""Stand-ins: archives of a data set's own layout, counts and file kinds, with drawn pictures instead of real ones.

For machines that cannot reach the real archive. What is learnt from them says nothing about the real data, so each
carries a mark that `is_stand_in` finds.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_tuning.data import breeds
from cnn_tuning.data.progress import with_progress
from cnn_tuning.errors import UserError
from cnn_tuning.machine import usable_cores

NAMES = ("dog_breeds", "cifar10", "cifar10_python")
_MARK = b"stand-in: drawn by cnn-tuning, no photographs"
_DATE = (2000, 1, 1, 0, 0, 0)
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIZES = ((500, 375), (375, 500), (400, 300), (640, 480), (300, 300), (320, 240), (768, 512), (240, 240))


def make(name: str, out: Path, *, share: float = 1.0, seed: int = 0, workers: int | None = None) -> dict[str, int]:
    """Write the archive and return its images by split; equal arguments give equal bytes."""
    if name not in NAMES:
        raise UserError(f"no stand-in for {name}: there is one for {', '.join(NAMES)}")
    if not 0 < share <= 1:
        raise UserError(f"share is {share:g}: it must be above 0 and at most 1")
    temporary = out.with_name(f".{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if name == "dog_breeds":
            made = _dog_breeds(temporary, share, seed, workers or usable_cores())
        else:
            made = _cifar10(temporary, share, seed, python=name == "cifar10_python")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return made


def is_stand_in(path: Path) -> bool:
    """Say whether a file is an archive that `make` wrote."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
        if head.startswith(b"\x1f\x8b"):
            return _MARK in head
        with zipfile.ZipFile(path) as archive:
            return archive.comment == _MARK
    except (OSError, zipfile.BadZipFile):
        return False


def _dog_breeds(path: Path, share: float, seed: int, workers: int) -> dict[str, int]:
    counts = breeds.counts(share)
    jobs = list(_photo_jobs(counts, seed))
    # Not fork: the caller may have threads, and a forked lock stays locked.
    pool = ProcessPoolExecutor(workers, get_context("forkserver")) if workers > 1 and len(jobs) > 500 else None
    try:
        drawn = pool.map(_photo, jobs, chunksize=32) if pool else map(_photo, jobs)
        with zipfile.ZipFile(path, "w") as archive:
            archive.comment = _MARK
            for member, data in with_progress(drawn, "draw", len(jobs)):
                archive.writestr(zipfile.ZipInfo(member, _DATE), data)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return {"val" if split == "valid" else split: int(n.sum()) for split, n in counts.items()}


def _photo_jobs(counts: dict[str, np.ndarray], seed: int) -> Iterator[tuple[str, int, int]]:
    """Yield a member's name, its class and a seed; images are numbered through the classes."""
    number = 0
    for label, folder in enumerate(breeds.folders()):
        for split in ("train", "valid", "test"):
            for _ in range(counts[split][label]):
                number += 1
                yield f"dogImages/{split}/{folder}/{breeds.BREEDS[label]}_{number:05}.jpg", label, seed + number


def _photo(job: tuple[str, int, int]) -> tuple[str, bytes]:
    member, label, seed = job
    rng = np.random.default_rng([seed, 0xD06])
    width, height = _SIZES[rng.integers(len(_SIZES))]
    # Drawn small and enlarged, as photographs are smooth; then a little noise.
    small = draw(label, len(breeds.BREEDS), (width // 2, height // 2), rng)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(80, 93)))
    return member, buffer.getvalue()


def draw(label: int, classes: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw one picture of a class, H×W×3: an oval in its two colours, striped its way, before any background.

    Classes differ by hue, direction and width of the stripes; place, size, brightness and background are chance.
    """
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    side = min(size)
    centre = rng.uniform(0.35, 0.65, 2) * size
    radii = rng.uniform(0.28, 0.45, 2) * side
    inside = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1
    # Three properties that number the classes: 12 hues, 4 directions, widths for the rest.
    hue = (label % 12) / 12 + rng.normal(0, 0.012)
    angle = np.pi * (label // 12 % 4) / 4 + rng.normal(0, 0.08)
    waves = (3 + 4 * (label // 48)) * rng.uniform(0.9, 1.1)
    phase = rng.uniform(0, 2 * np.pi)
    stripes = np.sin(2 * np.pi * waves / side * (x * np.cos(angle) + y * np.sin(angle)) + phase) > 0
    light = rng.uniform(0.65, 1.0)
    coat = np.where(stripes[..., None], _colour(hue, light), _colour(hue + 0.12, 0.45 * light))
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noise = rng.integers(-12, 13, (height, width, 1))
    return np.clip(np.where(inside[..., None], 255 * coat, ground) + noise, 0, 255).astype(np.uint8)


def _colour(hue: float, value: float) -> np.ndarray:
    """Return RGB in [0, 1] of a saturated hue in turns."""
    turns = (hue * 6 + np.array([5, 3, 1])) % 6
    return value * (1 - 0.8 * np.clip(np.minimum(turns, 4 - turns), 0, 1))


def _cifar10(path: Path, share: float, seed: int, *, python: bool) -> dict[str, int]:
    """Write five training batches and a test batch in the official form (cs.toronto.edu/~kriz/cifar.html)."""
    size = max(10, round(10_000 * share))
    batches = [(f"data_batch_{i}", i) for i in range(1, 6)] + [("test_batch", 6)]
    folder = "cifar-10-batches-py" if python else "cifar-10-batches-bin"
    # The gzip header carries the mark as the name of the packed file, and no time.
    with (
        path.open("wb") as file,
        gzip.GzipFile(_MARK.decode(), "wb", 1, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, number in with_progress(batches, "draw", len(batches)):
            pixels, labels = _cifar_batch(size, [seed, number])
            if python:
                _add(archive, f"{folder}/{name}", _pickled(name, pixels, labels))
            else:
                records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
                _add(archive, f"{folder}/{name}.bin", records.tobytes())
        if python:
            _add(archive, f"{folder}/batches.meta", pickle.dumps({"label_names": list(_CLASSES)}, protocol=2))
        else:
            _add(archive, f"{folder}/batches.meta.txt", "".join(f"{name}\n" for name in _CLASSES).encode())
    return {"train": 5 * size, "test": size}


def _cifar_batch(size: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % len(_CLASSES))
    pixels = np.stack([draw(int(label), len(_CLASSES), (32, 32), rng).transpose(2, 0, 1) for label in labels])
    return pixels.reshape(size, -1), labels


def _pickled(name: str, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    files = [f"drawn_{i:05}.png" for i in range(len(labels))]
    batch = {"batch_label": name, "labels": labels.tolist(), "data": pixels, "filenames": files}
    return pickle.dumps(batch, protocol=2)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
