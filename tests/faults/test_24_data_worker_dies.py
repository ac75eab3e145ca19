"""Row 24: a data worker dies; it is named in one line, nothing hangs, and the same command goes on."""

from __future__ import annotations

import signal

import psutil
import pytest
from striking import SAVING, by_hand  # noqa: F401

READING = ("trainer.data_on_device=no", "trainer.workers=2")


@pytest.mark.slow
def test_24_a_killed_worker_is_named(by_hand):  # noqa: F811
    process = by_hand.stage("train", *SAVING, *READING, at="train 5")
    stage = by_hand.reached(process)
    worker = workers(stage)[0]
    worker.kill()
    by_hand.until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, process)
    by_hand.go_on()
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    (told,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert f"DataLoader worker (pid {worker.pid}) is killed by signal: {signal.strsignal(signal.SIGKILL)}" in told
    assert "trainer.workers" in told
    assert by_hand.ends() == ["FAILED"]  # and nobody is left
    printed, _ = by_hand.stage("train", *SAVING, *READING).communicate(timeout=200)
    assert "going on from" in printed


def workers(stage):
    """Return the processes that read batches: this one's own copies."""
    return [child for child in stage.children() if child.cmdline() == stage.cmdline()]
