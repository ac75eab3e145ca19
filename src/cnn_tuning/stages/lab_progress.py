"""What a notebook shows of a running stage: its standard error in, one line that changes out."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TextIO

EVERY_S = 0.2


class LastLine(io.TextIOBase):
    """A stream whose last line is shown in the notebook, and all of which goes to a file."""

    def __init__(self, log: TextIO) -> None:
        from IPython.display import display

        self.log, self.shown_at = log, 0.0
        self.handle = display(_text(""), raw=True, display_id=True)

    def write(self, text: str) -> int:
        """Take a text, and show it if the last one was not shown just now."""
        self.log.write(text)
        if text.strip() and time.monotonic() - self.shown_at > EVERY_S:
            self.shown_at = time.monotonic()
            self._show(text.strip().splitlines()[-1])
        return len(text)

    def flush(self) -> None:
        """Write the file's buffer."""
        self.log.flush()

    def end(self) -> None:
        """Show nothing any more."""
        self._show("")

    def _show(self, line: str) -> None:
        if self.handle is not None:
            self.handle.update(_text(line), raw=True)


def _text(line: str) -> dict[str, str]:
    return {"text/plain": line}


@contextmanager
def one_line(log: Path) -> Iterator[None]:
    """Let progress, which goes to the standard error, be one line that changes; the whole of it is in `log`."""
    import rich.console

    detects = rich.console._is_jupyter
    with log.open("a", encoding="utf-8") as file:
        stream = LastLine(file)
        # rich takes a notebook for a terminal of its own, past the standard error, and has no setting against it.
        rich.console._is_jupyter = lambda: False
        try:
            with redirect_stderr(stream):
                yield
        finally:
            rich.console._is_jupyter = detects
            stream.end()
