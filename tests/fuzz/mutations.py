"""Valid bytes in, broken ones out (flips, cuts, splices, other heads); and the bounds of every input."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

HEAD = 64
# Numbers that readers multiply, allocate by and index with.
EDGES = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\1\0", b"\0" * 8]
SECONDS = 60  # a hang; machines are shared
MEBIBYTES = 256
# What a reader of data has no business with; writing is looked at with its path.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)
_watched: list[Path] = []
_seen: list[str] = []


@dataclass(frozen=True)
class Target:
    """A property: `inputs` are drawn, `check` raises where one breaks it; `examples` are for a short run."""

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    examples: int


@st.composite
def damaged(draw: st.DrawFn, whole: Sequence[bytes]) -> bytes:
    """Return one of `whole` with up to four kinds of damage, or bytes of no kind at all."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(draw(st.sampled_from(list(whole))))
    for kind in draw(st.lists(st.sampled_from(["flip", "head", "edge", "cut", "splice", "repeat"]), max_size=4)):
        _damage(draw, data, kind, whole)
    return bytes(data)


def _damage(draw: st.DrawFn, data: bytearray, kind: str, whole: Sequence[bytes]) -> None:
    if not data:
        return
    at = draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "head":
        data[at % min(HEAD, len(data))] = draw(st.integers(0, 255))
    elif kind == "edge":
        edge = draw(st.sampled_from(EDGES))
        data[at : at + len(edge)] = edge
    elif kind == "cut":
        del data[at:]
    elif kind == "splice":
        other = draw(st.sampled_from(list(whole)))
        begin = draw(st.integers(0, max(0, len(other) - 1)))
        data[at:at] = other[begin : begin + draw(st.integers(1, 200))]
    else:
        data[at:at] = data[at : at + draw(st.integers(1, 64))]


@contextlib.contextmanager
def harmless(folder: Path | None = None) -> Iterator[None]:
    """Hold an input to its bounds: seconds, memory, no process, no connection, no file outside `folder`.

    Raises AssertionError with what it did; whatever else it raises is the reader's.
    """
    _watch()
    _seen.clear()
    before, timer = _memory(reset=True), signal.signal(signal.SIGALRM, _too_long)
    _watched[:] = [folder or Path("/nonexistent")]
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, timer)
        _watched.clear()
    assert not _seen, f"the input made it {_seen}"
    grown = _memory() - before
    assert grown < MEBIBYTES, f"{grown} MiB for one input"


def _too_long(number: int, frame: object) -> None:
    raise AssertionError(f"more than {SECONDS} s for one input")


def _memory(*, reset: bool = False) -> int:
    """Return MiB: what the process has now with `reset`, else the most since then."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = re.search(r"VmRSS:\s+(\d+)" if reset else r"VmHWM:\s+(\d+)", status.read_text())
    return int(found[1]) >> 10 if found else 0


_watching: list[bool] = []


def _watch() -> None:
    """See what the interpreter does from now on (an audit hook stays for good)."""
    if not _watching:
        _watching.append(True)
        sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {str(arguments)[:80]}")
    elif event == "open" and isinstance(arguments[0], str | bytes) and _writes(arguments):
        path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace"))
        if not path.resolve().is_relative_to(_watched[0].resolve()):
            _seen.append(f"write {path}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & 3)


def one_line(error: BaseException) -> None:
    """Check the text of a refusal: one line, not too long for a terminal."""
    text = str(error)
    assert text.strip(), "an error without a word"
    assert "\n" not in text.strip(), f"more than a line: {text[:200]!r}"
    assert len(text) < 2000, f"{len(text)} letters: {text[:200]!r}"
