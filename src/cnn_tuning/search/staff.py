"""The worker processes of one search on this machine: a specification goes in on each one's standard input.

They have process groups of their own: a Ctrl-C in the terminal reaches the search, which asks them to stop.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

    def fate(self) -> str:
        """Return in a few words how it ended.

        A killed process is a zombie, and counts as gone, before the last of its threads has ended and its status
        can be had: that is waited for.
        """
        try:
            status = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "is alive"
        if status < 0:
            return f"was ended by {_signal_name(-status)}"
        return f"ended with status {status} ({self.last_words()})"

    def last_words(self) -> str:
        """Return the last line that it printed."""
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return lines[-1].strip().removeprefix("error: ") if lines else "it printed nothing"


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

    def of_pid(self, pid: int) -> Worker | None:
        """Return the worker with this number, the latest if there were several."""
        return next((w for w in [*self.workers, *reversed(self.left)] if w.pid == pid), None)

    def hire(self) -> None:
        """Start one more."""
        place = min(set(range(self.size)) - {worker.place for worker in self.workers})
        log = self.folder / f"worker-{place}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **_device(place, self.size)},
                start_new_session=True,
            )
        self.workers.append(Worker(process, place, log))
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(self.spec)).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already; the log says why

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


def _device(place: int, size: int) -> dict[str, str]:
    """Return what gives workers side by side a GPU each, where the machine has several."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = shown.split(",") if shown is not None else [str(number) for number in range(_gpus())]
    return {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if size > 1 and len(devices) > 1 else {}


def _gpus() -> int:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except Exception:  # no package, no driver, no permission: all mean that no GPU is used
        return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
