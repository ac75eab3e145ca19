"""What this process may use of its machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time

# mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes; each must fit an int.
_KEEP_FREED = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26))


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_process() -> None:
    """Settle what OpenMP and the allocator take from the machine; call it before torch is loaded.

    OpenMP's threads spin at barriers for so long that beside another busy process a training on all cores takes
    several times as long; on an idle machine the difference is within the noise. And glibc gives the memory of
    freed tensors back to the system, which has to clear it anew in the next step: a fifth to a third of a step's
    time on a virtual machine (`bench/allocator.py`). Kept, it is the process's peak until its end; no bit of a
    result depends on it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: nothing to settle
        allocator = ctypes.CDLL(None)
        for option, value in _KEEP_FREED:
            allocator.mallopt(option, value)


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
