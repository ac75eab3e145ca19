"""What Ray runs on a host for each worker: a job comes in, the worker's process is run, its end goes out.

The worker is the one of a local search, in a process of its own: it takes the signals that Ray's own processes
keep for themselves, a crash of it is told as such, and it saves and leaves when Ray's process is gone.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.processes import last_words, start
from cnn_tuning.search.staff import COMMAND

# Of a host that lacks what the search needs; sysexits.h calls it EX_CONFIG.
UNFIT = 78
META = "meta.json"


@dataclass(frozen=True)
class Job:
    """A worker's specification, and where its host finds what the search has: paths are the same on all hosts.

    `mark` is a file of the search's folder; where a host need not have it, all comes by database and server.
    """

    spec: dict[str, Any]
    project: str
    mark: str
    must_share: bool
    log: str


class Seat:
    """One worker on one host, with what Ray gave it of the host's cores and GPUs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._signum = 0

    def host(self) -> str:
        """Return the host's name."""
        return platform.node()

    def work(self, job: Job) -> tuple[int, str]:
        """Run the worker, or wait for one that runs; return its status (a signal is negative) and last words."""
        unfit = problem_of(job)
        if unfit:
            return UNFIT, unfit
        with self._lock:
            if self._signum:
                return 128 + self._signum, ""
            if self._process is None:
                self._process = _start(job)
        status = self._process.wait()
        return status, last_words(Path(job.log)) if status > 0 else ""

    def send(self, signum: int) -> None:
        """Send the worker a signal; one that is stopped is woken for it."""
        with self._lock:
            self._signum = signum
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signum)
                self._process.send_signal(signal.SIGCONT)


def _start(job: Job) -> subprocess.Popen[bytes]:
    log = Path(job.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    return start(COMMAND, {**job.spec, "boss": os.getpid()}, log, cwd=job.project)


def problem_of(job: Job) -> str | None:
    """Return why this host cannot work on the search, in a line; None if it can."""
    project = Path(job.project)
    if not project.is_dir():
        return f"no folder {project}: share the project's folder with all hosts, at the same path (NFS, EFS)"
    data = project / job.spec["data"]
    if not (data / META).is_file():
        return f"no data in {data}: share the project's folder with all hosts (NFS, EFS), or bring the data there"
    mark = Path(job.mark)
    if job.must_share and not mark.exists():
        return (
            f"{mark.parent} is not the search's own: share the project's folder with all hosts (NFS, EFS), or "
            "set search.storage=postgresql://… and tracking.uri=http://…"
        )
    return None
