"""Processes that work for this one: what they are to do goes in on standard input, what they print into a log."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def start(
    command: Sequence[str], told: Mapping[str, Any], log: Path, *, keep_input: bool = False, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own and tell it its task, one line of JSON.

    A Ctrl-C in the terminal does not reach it. `keep_input` leaves its input open: it may end when that does.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, **options
        )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        if not keep_input:
            process.stdin.close()
    except BrokenPipeError:
        pass  # it is dead already; the log says why
    return process


def last_words(log: Path) -> str:
    """Return the last line that a process printed."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip().removeprefix("error: ") if lines else "it printed nothing"


def how_ended(status: int) -> str:
    """Return an exit status in words: negative is a signal."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}"
