"""The processes below one, with their command lines; what dies meanwhile is left out."""

from __future__ import annotations

import psutil


def below(pid: int | None = None, *, recursive: bool = True) -> list[tuple[psutil.Process, list[str]]]:
    """Return the living processes that one (default: this) has started, each with its command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=recursive):
        try:
            found.append((process, process.cmdline()))
        except psutil.NoSuchProcess:  # also one that is dead and not yet waited for
            continue
    return found
