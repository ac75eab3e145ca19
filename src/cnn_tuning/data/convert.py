"""Conversion in bounded memory: chunks of raw images come in, their pixels go straight into `images.npy`.

Each chunk is converted by itself, in a pool of processes where images must be decoded or resized, so neither
the pixels nor the sums depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cnn_tuning.config import ImageConfig
from cnn_tuning.data.images import BadImage, to_input
from cnn_tuning.errors import UserError

_CHUNK_BYTES = 16 << 20
_CHUNK_IMAGES = {"files": 64, "arrays": 2048}
_MAX_FILE_BYTES = 512 << 20


@dataclass(frozen=True)
class ImageFile:
    """An `images.npy` of `count` images that is written in pieces, in any order and by any process."""

    path: Path
    count: int
    image: ImageConfig

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.image.channels, *self.image.size)

    def create(self) -> None:
        """Write the header and room for all images."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            start = self._write_header(file, self.count)
            file.truncate(start + self.count * math.prod(self.shape))

    def _write_header(self, file: BinaryIO, count: int) -> int:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        return file.tell()

    def write(self, start: int, pixels: np.ndarray) -> None:
        """Write images from position `start` on; by plain writes, as a memory map's pages count as memory."""
        try:
            with self.path.open("r+b") as file:
                self._to_images(file, start)
                file.write(np.ascontiguousarray(pixels).data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def compact(self, valid: np.ndarray) -> None:
        """Keep the images where `valid`, in order."""
        if valid.all():
            return
        position = 0
        for start, images in self._blocks():
            kept = images[valid[start : start + len(images)]]
            self.write(position, kept)  # never ahead of what is read
            position += len(kept)
        with self.path.open("r+b") as file:
            begin = self._write_header(file, position)
            file.truncate(begin + position * math.prod(self.shape))

    def digest(self, labels: np.ndarray) -> str:
        """Return the SHA-256 over images and labels, as `packed.digest_of`."""
        digest = hashlib.sha256()
        for _, images in replace(self, count=len(labels))._blocks():
            digest.update(images.data)
        digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Read all images, a few at a time."""
        row = math.prod(self.shape)
        block = max(1, _CHUNK_BYTES // row)
        for start in range(0, self.count, block):
            count = min(block, self.count - start)
            with self.path.open("rb") as file:
                self._to_images(file, start)
                yield start, np.fromfile(file, np.uint8, count * row).reshape(count, *self.shape)

    def _to_images(self, file: BinaryIO, start: int) -> None:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(start * math.prod(self.shape), os.SEEK_CUR)


@dataclass(frozen=True)
class Chunk:
    """Images for the positions from `start` on of a split: an array, or files below `root`."""

    split: str
    start: int
    images: np.ndarray | Sequence[str]
    root: Path
    target: ImageFile


@dataclass(frozen=True)
class Converted:
    """What became of a chunk.

    `valid`: which images were written. `sums`, `squares`: of the pixel values, exact, per channel. `files`:
    a sum of 256-bit digests of each path and its bytes, in no order.
    """

    split: str
    start: int
    valid: np.ndarray
    rejected: tuple[tuple[str, str], ...]
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    files: int


def fits(images: np.ndarray | Sequence[str], image: ImageConfig) -> bool:
    """Return whether arrays have the input's size and channels already, so that nothing is computed."""
    if not isinstance(images, np.ndarray) or images.shape[1:3] != tuple(image.size):
        return False
    return image.channels == (1 if images.ndim == 3 else images.shape[3])


def chunks_of(
    split: str, images: np.ndarray | Sequence[str], indices: np.ndarray, root: Path, target: ImageFile
) -> Iterator[Chunk]:
    """Cut the chosen images into chunks of a size that depends on the data alone."""
    most = _CHUNK_IMAGES["arrays" if fits(images, target.image) else "files"]
    size = min(most, max(1, _CHUNK_BYTES // math.prod(target.shape)))
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        part = images[chosen] if isinstance(images, np.ndarray) else [images[i] for i in chosen]
        yield Chunk(split, start, part, root, target)


def convert(chunk: Chunk) -> Converted:
    """Write a chunk's pixels into its file."""
    image = chunk.target.image
    if fits(chunk.images, image):
        assert isinstance(chunk.images, np.ndarray)
        stacked = chunk.images[:, None] if chunk.images.ndim == 3 else chunk.images.transpose(0, 3, 1, 2)
        pixels, files = np.ascontiguousarray(stacked), 0
        valid = np.ones(len(pixels), bool)
        rejected: list[tuple[str, str]] = []
    else:
        pixels, valid, rejected, files = _decoded(chunk)
    chunk.target.write(chunk.start, pixels)
    sums, squares = _sums(pixels)
    return Converted(chunk.split, chunk.start, valid, tuple(rejected), sums, squares, files % (1 << 256))


def _sums(pixels: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sums of values and of their squares, per channel; exact: doubles hold whole numbers to 2^53."""
    sums = squares = np.zeros(pixels.shape[1], np.int64)
    most = max(1, (1 << 20) // math.prod(pixels.shape[1:]))  # what stays in the processor's cache
    for start in range(0, len(pixels), most):
        wide = pixels[start : start + most].astype(np.float64)
        sums = sums + wide.sum(axis=(0, 2, 3)).astype(np.int64)
        squares = squares + np.einsum("nchw,nchw->c", wide, wide).astype(np.int64)
    return tuple(sums.tolist()), tuple(squares.tolist())


def _decoded(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]], int]:
    pixels = np.zeros((len(chunk.images), *chunk.target.shape), np.uint8)
    valid = np.ones(len(pixels), bool)
    rejected: list[tuple[str, str]] = []
    files = 0
    for place, item in enumerate(chunk.images):
        name = item if isinstance(item, str) else f"{chunk.split} image {chunk.start + place}"
        try:
            if isinstance(item, str):
                item = _bytes_of(chunk.root / item)
                files += int.from_bytes(hashlib.sha256(os.fsencode(name) + b"\0" + item).digest())
            pixels[place] = to_input(item, chunk.target.image)
        except BadImage as error:
            valid[place] = False
            rejected.append((name, str(error)))
    return pixels, valid, rejected, files


def _bytes_of(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise BadImage(f"{size} bytes, more than the limit of {_MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None


def convert_all(chunks: Iterator[Chunk], workers: int) -> Iterator[Converted]:
    """Convert chunks in their order, at most two a worker under way; one worker is this process itself."""
    if workers == 1:
        yield from map(convert, chunks)
        return
    # Not fork: the caller may have threads (torch, tracking), and a forked lock stays locked.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    first = pool.submit(os.getpid)
    under_way: deque[Future[Converted]] = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(convert, chunk))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        if first.done() and first.exception() is None:
            remedy = "close other programs, or run `taskset -c 0 dvc repro preprocess`"
            raise UserError(f"a preprocessing worker was killed (out of memory?): {remedy}") from None
        seen = "what they printed above says why (nothing there: out of memory)"
        raise UserError(f"the preprocessing workers could not start: {seen}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave no worker behind when the main process is killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        # A pipe that the kernel closes with the parent: unlike its number it is not used again, and a parent
        # that is dead but not yet waited for counts as dead.
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
