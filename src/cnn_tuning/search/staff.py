"""The worker processes of one search on this machine: a specification goes in on each one's standard input.

`ray_staff.RayStaff` has the same methods, for processes anywhere.

They have process groups of their own: a Ctrl-C in the terminal reaches the search, which asks them to stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.processes import how_ended, last_words, start
from cnn_tuning.search.study import is_gone, process_of

COMMAND = [sys.executable, "-P", "-m", "cnn_tuning.search.worker"]
EXIT_S = 10.0
SAVE_S = 120.0  # a worker that was asked to stop may take so long to save


@dataclass
class Worker:
    """One process, its place among the others, and the file that it prints to."""

    process: subprocess.Popen[bytes]
    place: int
    log: Path

    @property
    def pid(self) -> int:
        """Return its number."""
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Return how it ended (a signal as a negative number), None while it works."""
        return self.process.returncode

    def has(self, name: str) -> bool:
        """Return whether a process's name is this one's."""
        return f":{self.pid}:" in name

    def fate(self) -> str:
        """Return in a few words how it ended.

        A killed process is a zombie, and counts as gone, before the last of its threads has ended and its status
        can be had: that is waited for.
        """
        try:
            status = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "is alive"
        return how_ended(status) if status < 0 else f"{how_ended(status)} ({last_words(self.log)})"


class Staff:
    """At most `size` workers at a time."""

    def __init__(self, size: int, folder: Path, spec: Any) -> None:
        self.size, self.folder, self.spec = size, folder, spec
        self.workers: list[Worker] = []
        self.left: list[Worker] = []

    def alive(self) -> list[Worker]:
        """Return those that work; the others are in `left`."""
        self.left += [worker for worker in self.workers if worker.process.poll() is not None]
        self.workers = [worker for worker in self.workers if worker.process.returncode is None]
        return self.workers

    def of(self, name: str) -> Worker | None:
        """Return the worker with this name, the latest if there were several."""
        return next((w for w in [*self.workers, *reversed(self.left)] if w.has(name)), None)

    def is_gone(self, name: str) -> bool:
        """Return whether the process of this name is known to be dead."""
        return is_gone(name)

    def end(self, name: str) -> None:
        """Kill a process that gives no sign of life, where it is of this machine."""
        from psutil import wait_procs

        process = process_of(name)
        if process is None:
            return
        known = self.of(name)
        process.kill()
        if known is not None:
            known.process.wait()
        else:
            wait_procs([process], timeout=10)

    def hire(self) -> None:
        """Start one more."""
        place = min(set(range(self.size)) - {worker.place for worker in self.workers})
        log = self.folder / f"worker-{place}.log"
        devices = self.spec.recipe.trainer.devices
        given = _device(place, self.size, devices if isinstance(devices, int) else 1)
        process = start(COMMAND, asdict(self.spec), log, env={**os.environ, **given})
        self.workers.append(Worker(process, place, log))

    def ask_to_stop(self) -> None:
        """Ask all to save and leave; one that is stopped is woken for it."""
        for worker in self.alive():
            worker.process.send_signal(signal.SIGTERM)
            worker.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End all at once."""
        for worker in self.alive():
            worker.process.kill()

    def wait(self) -> None:
        """Wait until all have left; those that take too long are killed."""
        deadline = time.monotonic() + SAVE_S
        while self.alive():
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)

    def close(self) -> None:
        """Give back what the staff took besides its workers: nothing here."""


def _device(place: int, size: int, each: int) -> dict[str, str]:
    """Return what gives workers side by side `each` GPUs of their own, where the machine has several."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = shown.split(",") if shown is not None else [str(number) for number in range(_gpus())]
    shares = len(devices) // each
    if size == 1 or len(devices) == 1 or not shares:
        return {}
    first = place % shares * each
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + each])}


def _gpus() -> int:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except Exception:  # no package, no driver, no permission: all mean that no GPU is used
        return 0
