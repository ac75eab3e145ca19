"""What a worker hears and says while it trains: signals that ask it to stop come in, signs of life go out."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cnn_tuning.search.study import SharedStudy


class Asked:
    """Whether this process was asked to stop, whoever took the signal: a fit takes it while it trains."""

    def __init__(self) -> None:
        self.noted = self.came = 0
        self._read, write = socket.socketpair()
        for end in (self._read, write):
            end.setblocking(False)
        self._write = write  # kept open
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self.listen()

    def listen(self) -> None:
        """Take the signals (again: a fit that ended with an error has kept them)."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def pass_on(self) -> None:
        """Give a fit that trains now the signal that came before it listened."""
        if self.noted:
            signum, self.noted = self.noted, 0
            os.kill(os.getpid(), signum)

    def to_stop(self) -> int:
        """Return the signal that came at any time, or 0."""
        with suppress(BlockingIOError):
            for signum in self._read.recv(100):
                self.came = signum if signum in (signal.SIGTERM, signal.SIGINT) else self.came
        return self.came

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.noted = signum


class Beat:
    """A thread that tells the study every so often how long this process has worked on a trial: it lives."""

    def __init__(self, study: SharedStudy, number: int, before_s: float) -> None:
        self.study, self.number, self.before_s = study, number, before_s
        self.began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def seconds(self) -> float:
        """Return the seconds spent on the trial, tries before included."""
        return self.before_s + time.monotonic() - self.began

    def _run(self) -> None:
        while not self._over.wait(self.study.search.heartbeat_s):
            with suppress(Exception):  # a storage that does not answer now may do so the next time
                self.study.beat(self.number, self.seconds())

    def __enter__(self) -> Beat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
