"""The faults: each strikes a run that is under way, says what it did, and knows how the world is mended after."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chaos_place import Place, Workshop

DISK = "200m"
# An S3 server is only asked in these parts of the pipeline.
OF_S3 = ("fetch", "push", "pull")
OF_STORE = ("train", "ablate", "tune", "evaluate")


@dataclass(frozen=True)
class Struck:
    """What was done; how to mend it once the pipeline ended; the file that was cut."""

    told: str
    mend: Callable[[], None] = lambda: None
    cut: Path | None = None


def killed(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """SIGKILL for the process group."""
    place.signal(signal.SIGKILL)
    return Struck("SIGKILL")


def terminated(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """SIGTERM for the process group."""
    place.signal(signal.SIGTERM)
    return Struck("SIGTERM")


def disk_full(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """The run's file system is filled to the last byte until the pipeline has ended."""
    filler = place.folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    free = shutil.disk_usage(place.folder).free
    return Struck(f"disk filled, {free} bytes free", lambda: filler.unlink())


def tracking_down(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """The tracking server is killed; it comes back after the pipeline, or while it goes on."""
    server = shop.mlflow
    assert server is not None
    server.kill()
    if rng.random() < 0.5:
        return Struck("server killed", lambda: server.start() and None)
    time.sleep(rng.uniform(0, 3))
    server.start()
    return Struck("server killed and started again")


def file_cut(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """The power goes: all dies, and one file of the state or of an output under way has lost its end."""
    place.signal(signal.SIGKILL)
    place.wait()
    claimed = (place.project / "dvc.lock").read_text() if (place.project / "dvc.lock").exists() else ""
    tops = [".state", *(top for top in ("data/raw", "data/prepared", "models/baseline", "models/tuned",
            "results/training", "results/ablation", "results/search", "results/evaluation")
            if f"path: {top}\n" not in claimed)]  # fmt: skip
    files = [
        file
        for top in tops
        for file in sorted((place.project / top).rglob("*"))
        if file.is_file() and not file.is_symlink() and file.stat().st_size
    ]
    if not files:
        return Struck("SIGKILL (nothing to cut yet)")
    file = rng.choice(files)
    size = file.stat().st_size
    kept = rng.randrange(size)
    os.truncate(file, kept)
    name = file.relative_to(place.project)
    return Struck(f"SIGKILL, {name} cut from {size} to {kept} bytes", cut=file)


def s3_down(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """The S3 server dies or hangs until the pipeline has ended."""
    if rng.random() < 0.5:
        shop.weed.kill()
        return Struck("S3 killed", lambda: shop.weed.start() and None)
    shop.weed.signal(signal.SIGSTOP)
    return Struck("S3 stopped", lambda: shop.weed.signal(signal.SIGCONT))


def clock_jump(place: Place, shop: Workshop, rng: random.Random) -> Struck:
    """The clock jumps by up to 400 days, and back once the pipeline has ended.

    Without libfaketime it is the files' times that jump.
    """
    days = rng.choice((-1, 1)) * rng.choice((rng.uniform(0.04, 1), rng.uniform(1, 400)))
    clock = place.folder / "clock"
    if clock.exists():
        _set_clock(clock, days * 86400)
        return Struck(f"clock {days:+.2f} days", lambda: _set_clock(clock, 0))
    for file in place.project.rglob("*"):
        with contextlib.suppress(OSError):
            when = file.stat().st_mtime + days * 86400
            os.utime(file, (when, when), follow_symlinks=False)
    return Struck(f"times of files {days:+.2f} days")


def _set_clock(clock: Path, seconds: float) -> None:
    new = clock.with_name("clock.new")
    new.write_text(f"{seconds:+.0f}\n")
    new.replace(clock)


FAULTS: dict[str, Callable[[Place, Workshop, random.Random], Struck]] = {
    "kill": killed,
    "terminate": terminated,
    "disk": disk_full,
    "tracking": tracking_down,
    "cut": file_cut,
    "s3": s3_down,
    "clock": clock_jump,
}


@contextmanager
def folder_of(run: Path, *, small: bool) -> Iterator[Path]:
    """Give a run its folder, for a full disk one on a file system of its own (needs root)."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    if not small:
        yield run
        return
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(run)]
    subprocess.run(mounted, check=True, capture_output=True)
    try:
        yield run
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)
