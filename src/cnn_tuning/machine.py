"""What this process may use of its machine."""

from __future__ import annotations

import os
import signal
import threading
import time


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> None:
    """Let OpenMP's threads wait at barriers without spinning for long; call it before torch is loaded.

    By default they spin for so long that beside another busy process a training on all cores takes several
    times as long; on an idle machine the difference is within the noise.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def end_with(pid: int) -> None:
    """Let this process be asked to stop (SIGTERM) when another is gone, even by a kill: no orphan goes on."""

    def wait() -> None:
        import psutil

        try:
            other = psutil.Process(pid)
            while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        except psutil.NoSuchProcess:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
