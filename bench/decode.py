"""JPEG files to the network's input: `to_input` against PIL + torchvision's loader, on the same cores, in one run.

python bench/decode.py [--images 600] [--rounds 5] [--parts]

Makes JPEGs (quality 90) from the photographs that scikit-learn and matplotlib carry, in two sizes: 500×375, as
most of the dog breeds are, and 1600×1200, as cameras give. The other side is `ImageFolder` with Resize, CenterCrop
and PILToTensor in a `DataLoader` of batches of 64. Each is measured in one process (one thread) and on all cores:
as many workers as cores on both sides, warm, ours with writing the pixels to a file. Each measurement is a process
of its own, the sides take turns, the best of each counts. `--parts` measures decoders and resizers one by one;
those that are not installed are left out.

The choice, by `--parts` on one core of an Intel Xeon (Emerald Rapids, 2.3 GHz), milliseconds an image:

| step | 500×375 | 1600×1200 |
|---|---|---|
| decode: PIL | 1.08 | 9.92 |
| decode: simplejpeg | 0.90 | 7.97 |
| decode: torchvision.io | 1.00 | 8.18 |
| decode: kornia-rs | 0.85 | 8.39 |
| decode: PIL, at least twice the size needed (draft) | 1.09 | 7.26 |
| decode: simplejpeg, the same | 0.81 | 6.63 |
| resize: PIL, Resize + CenterCrop | 1.19 | 6.60 |
| resize: PIL, the middle only | 0.85 | 4.68 |
| resize: PIL, the middle only, reducing_gap=2 | 0.84 | 2.81 |
| resize: torch, antialias, the middle only | 0.40 | 1.48 |

Whole JPEGs take the decoders nearly equally long: all are libjpeg-turbo, and Huffman decoding is most of it; PIL
adds a copy to four bytes a pixel. simplejpeg was chosen: it gives Pillow's pixels bit for bit (tested), decodes at
a fraction of the size, is strict about damage, and is loaded in milliseconds. torchvision.io needs torch, which
would cost `preprocess` 2 s and 250 MB a process, and cannot scale; PyTurboJPEG needs a library of the system;
kornia-rs decodes alike, but its resize is not antialiased as Pillow's is. Resizing is left to Pillow, and is now
half of the time. cykooz-resizer 4.0.1 would take a third of it (0.32 and 1.54 ms) and gave 2.0 to 2.6 times the
loader's images/s, but crashes the process: 72×15 pixels to 12×2 end in a segmentation fault after a few
thousand calls. torch's antialiased resize is as quick and worth a trial.
"""

import argparse
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from workplace import machine

from cnn_tuning.config import ImageConfig
from cnn_tuning.machine import usable_cores

SIDE = 240
IMAGE = ImageConfig((SIDE, SIDE), 3)
SIZES = ((500, 375), (1600, 1200))


def photographs() -> list[np.ndarray]:
    """Return the real photographs at hand."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    hopper = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    return [*load_sample_images().images, np.asarray(Image.open(hopper).convert("RGB"))]


def make_folder(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEGs of parts of the photographs at their own resolution, put side by side and mirrored."""
    rng, sources = np.random.default_rng(0), photographs()
    width, height = size
    for number in range(count):
        canvas = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, 400):
            for left in range(0, width, 500):
                source = sources[rng.integers(len(sources))][:, :: rng.choice((-1, 1))]
                rows, columns = min(400, height - top), min(500, width - left)
                y, x = (rng.integers(0, n - m + 1) for n, m in zip(source.shape, (rows, columns), strict=False))
                canvas[top : top + rows, left : left + columns] = source[y : y + rows, x : x + columns]
        path = folder / f"class_{number % 5}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas).save(path, quality=90)
    return folder


def torchvision_loader(folder: Path, cores: int) -> Iterator[Callable[[], object]]:
    """Give one pass of the plain loader, its workers started."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    steps = [transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.PILToTensor()]
    data = ImageFolder(str(folder), transforms.Compose(steps))
    workers = cores if cores > 1 else 0
    loader = DataLoader(data, 64, num_workers=workers, persistent_workers=workers > 0)

    def once() -> None:
        assert sum(len(labels) for _, labels in loader) == len(data)

    yield once


def ours(folder: Path, cores: int) -> Iterator[Callable[[], object]]:
    """Give one pass of `to_input` over all files into one file of pixels, its workers started."""
    paths = sorted(folder.rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "pixels"
        target.touch()
        parts = [(target, start, paths[start : start + 64]) for start in range(0, len(paths), 64)]
        if cores == 1:
            yield lambda: list(map(convert_part, parts))
            return
        with ProcessPoolExecutor(cores, multiprocessing.get_context("forkserver")) as pool:
            yield lambda: list(pool.map(convert_part, parts))


def convert_part(part: tuple[Path, int, list[Path]]) -> None:
    """Decode some files and write their pixels at their place."""
    from cnn_tuning.data.images import to_input

    target, start, paths = part
    pixels = np.stack([to_input(path.read_bytes(), IMAGE) for path in paths])
    with target.open("r+b") as file:
        file.seek(start * pixels[0].size)
        file.write(pixels.data)


SIDES = {"torchvision": torchvision_loader, "ours": ours}


def measured(side: str, folder: Path, cores: int) -> float:
    """Return the seconds of one pass after another that does not count, in a process apart."""
    command = [sys.executable, __file__, "--one", side, str(folder), str(cores)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_one(side: str, folder: Path, cores: int) -> None:
    """Print the best of three passes after a first one."""
    for once in SIDES[side](folder, cores):
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - start)
        print(min(seconds[1:]))


def compare(images: int, rounds: int) -> None:
    """Print images/s of both sides and their ratio."""
    print("| size | cores | PIL + torchvision, images/s | to_input, images/s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            total = max(images * SIZES[0][0] * SIZES[0][1] // (size[0] * size[1]), 64)
            folder = make_folder(Path(name) / str(size[0]), size, total)
            for cores in sorted({1, usable_cores()}):
                runs = [
                    (measured("torchvision", folder, cores), measured("ours", folder, cores))
                    for _ in range(rounds)
                ]
                theirs, own = map(min, zip(*runs, strict=True))
                rates = f"{total / theirs:,.0f} | {total / own:,.0f} | {theirs / own:.2f}"
                print(f"| {size[0]}×{size[1]} | {cores} | {rates} |", flush=True)


def seconds(passes: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the best time of each pass, taken in turns after one that does not count."""
    best = [float("inf")] * len(passes)
    for round_ in range(rounds + 1):
        for place, one in enumerate(passes):
            start = time.perf_counter()
            one()
            if round_:
                best[place] = min(best[place], time.perf_counter() - start)
    return best


def decoders() -> Iterator[tuple[str, Callable[[bytes], object]]]:
    """Yield what decodes a JPEG here."""

    def pillow(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image

    yield "PIL", pillow
    import simplejpeg

    yield "simplejpeg", lambda data: simplejpeg.decode_jpeg(data)
    import torch
    from torchvision.io import decode_jpeg

    yield "torchvision.io", lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    try:
        from turbojpeg import TurboJPEG

        turbo = TurboJPEG()
        yield "PyTurboJPEG", lambda data: turbo.decode(data)
    except (ImportError, RuntimeError):
        pass
    try:
        from kornia_rs.io import decode_image_jpegturbo

        yield "kornia-rs", lambda data: decode_image_jpegturbo(data, "rgb")
    except ImportError:
        pass

    def draft(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.draft(None, (2 * SIDE, 2 * SIDE))
        image.load()
        return image

    yield "PIL, at least twice the size needed (draft)", draft
    yield (
        "simplejpeg, the same",
        lambda data: simplejpeg.decode_jpeg(data, min_factor=2, min_width=2 * SIDE, min_height=2 * SIDE),
    )


def resizers(pixels: np.ndarray) -> Iterator[tuple[str, Callable[[bytes], object]]]:
    """Yield what brings decoded pixels to the size."""
    import torch
    from torchvision.transforms.functional import center_crop, resize

    picture = Image.fromarray(pixels)
    side = min(pixels.shape[:2])
    tensor = torch.from_numpy(pixels[:side, :side]).permute(2, 0, 1)[None]
    yield "PIL, Resize + CenterCrop", lambda _: center_crop(resize(picture, [SIDE]), [SIDE])
    yield (
        "PIL, the middle only",
        lambda _: picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (0, 0, side, side)),
    )
    yield (
        "PIL, the middle only, reducing_gap=2",
        lambda _: picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (0, 0, side, side), 2.0),
    )
    yield (
        "torch, antialias, the middle only",
        lambda _: torch.nn.functional.interpolate(tensor, (SIDE, SIDE), mode="bilinear", antialias=True),
    )


def apply(step: Callable[[bytes], object], files: list[bytes]) -> None:
    """Do a step for each file."""
    for data in files:
        step(data)


def parts(rounds: int) -> None:
    """Print the milliseconds of each part."""
    import torch

    torch.set_num_threads(1)
    columns: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            folder = make_folder(Path(name) / str(size[0]), size, 12)
            files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
            pixels = np.array(Image.open(io.BytesIO(files[0])).convert("RGB"))
            steps = [
                *((f"decode: {n}", f) for n, f in decoders()),
                *((f"resize: {n}", f) for n, f in resizers(pixels)),
            ]
            passes = [partial(apply, step, files) for _, step in steps]
            for (label, _), best in zip(steps, seconds(passes, rounds), strict=True):
                columns.setdefault(label, []).append(1000 * best / len(files))
    for label, (small, large) in columns.items():
        print(f"| {label} | {small:.2f} | {large:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.one:
        measure_one(arguments.one[0], Path(arguments.one[1]), int(arguments.one[2]))
        return
    print(machine())
    if arguments.parts:
        parts(arguments.rounds)
    else:
        compare(arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
