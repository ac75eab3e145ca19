"""A command under supervision: it runs in a process group of its own until it ends or is to be ended.

What ends it early: the spot notice, the end of the host's lifetime, a word from the laptop, a signal to the agent.
Then the group gets SIGTERM, has time to save, and is killed only if it outlives that.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

from cnn_tuning.cloud.metadata import Metadata
from cnn_tuning.errors import redact

Reason = Literal["ended", "notice", "lifetime", "asked", "signal"]
KEPT_LINES = 20
TICK_S = 0.2
# For an upload that had begun when the command ended by itself.
PATIENCE_S = 60.0
_STAGE = re.compile(r"Running stage '([^']+)'")


@dataclass(frozen=True)
class Times:
    """In seconds. `ends_at`: when the host ends itself, since the epoch; `margin`: so long before it, stop."""

    ends_at: float | None = None
    margin: float = 180.0
    look_every: float = 5.0
    progress_every: float = 15.0
    save_every: float = 120.0
    grace: float = 45.0  # a training saves within it: resume.GRACE_S and a write

    @property
    def stop_at(self) -> float:
        """When to stop working. A lifetime that is shorter than two margins is worked for half of it at least."""
        if self.ends_at is None:
            return float("inf")
        return max(self.ends_at - self.margin, (time.time() + self.ends_at) / 2)


@dataclass
class Output:
    """What a command has printed lately, and the stage of the pipeline that it is in."""

    stage: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))

    def follow(self, stream: Iterator[str]) -> None:
        """Print each line without its secrets, and keep the last ones."""
        for line in stream:
            text = redact(line.rstrip("\n"))
            print(text, flush=True)
            self.lines.append(text)
            if found := _STAGE.search(text):
                self.stage = found[1]


@dataclass(frozen=True)
class Ended:
    """How it went: why, the command's exit status (negative: the signal), how long stopping took."""

    reason: Reason
    code: int
    seconds: float = 0.0


def supervise(
    command: Sequence[str],
    times: Times,
    output: Output,
    *,
    report: Callable[[], bool],
    saves: Sequence[Callable[[], None]],
    metadata: Metadata | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command to its end, or to the first reason to end it.

    `report` (it says whether the laptop wants an end) and each of `saves` are called now and then beside it, each
    in a thread of its own, so that none waits for a slow one; what they raise is printed. One may still be at work
    on return.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    assert process.stdout is not None
    done = threading.Event()
    noticed, asked = threading.Event(), threading.Event()
    pump = threading.Thread(target=output.follow, args=(process.stdout,), daemon=True)
    watch = threading.Thread(target=_watch, args=(metadata or Metadata(), times, noticed, done), daemon=True)
    tell = threading.Thread(target=_ask, args=(times.progress_every, report, asked, done), daemon=True)
    saving = [threading.Thread(target=_repeat, args=(times.save_every, save, done), daemon=True) for save in saves]
    stop_at = times.stop_at
    came = _note_signals()
    for thread in (pump, watch, tell, *saving):
        thread.start()
    reason: Reason = "ended"
    while process.poll() is None and reason == "ended":
        if noticed.is_set():
            reason = "notice"
        elif came:
            reason = "signal"
        elif asked.is_set():
            reason = "asked"
        elif time.time() >= stop_at:
            reason = "lifetime"
        else:
            time.sleep(TICK_S)
    began = time.monotonic()
    end_group(process.pid, times.grace)
    code = process.wait()
    took = time.monotonic() - began
    done.set()
    until = time.monotonic() + (PATIENCE_S if reason == "ended" else 0.0)  # else every second counts
    for thread in (tell, *saving):
        thread.join(timeout=max(0.0, until - time.monotonic()))
    pump.join(timeout=2)
    return Ended(reason, code, took)


def end_group(group: int, grace: float) -> None:
    """Ask what is left of a process group to end, wait for it, and kill what does not."""
    for signum, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        if not _members(group):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signum)
        until = time.monotonic() + patience
        while _members(group) and time.monotonic() < until:
            time.sleep(TICK_S)


def _members(group: int) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def _watch(metadata: Metadata, times: Times, noticed: threading.Event, done: threading.Event) -> None:
    while not done.is_set():
        if (at := metadata.notice()) is not None:
            print(f"spot notice: EC2 takes this host away at {at:%Y-%m-%dT%H:%M:%SZ}", flush=True)
            noticed.set()
            return
        done.wait(times.look_every)


def _ask(every: float, report: Callable[[], bool], asked: threading.Event, done: threading.Event) -> None:
    while not done.is_set():
        if _try(report):
            asked.set()
        done.wait(every)


def _repeat(every: float, save: Callable[[], None], done: threading.Event) -> None:
    while not done.wait(every):
        _try(save)


def _try(action: Callable[[], bool | None]) -> bool | None:
    """Return what an action does; a bucket that does not answer now costs no training."""
    try:
        return action()
    except Exception as error:
        print(redact(f"{type(error).__name__}: {error}; trying again later"), file=sys.stderr, flush=True)
    return None


def _note_signals() -> list[int]:
    """Note signals from here on, to the end of the process: saving is not cut off by a second one."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return came
