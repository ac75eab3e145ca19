"""Row 10: SIGTERM in the middle of a batch; a checkpoint, exit status 143, run KILLED, dvc.lock as it was.

Row 12 of a single training: Ctrl-C, once and twice; the same with exit status 130.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from striking import SAVING, _begun, begun, by_hand  # noqa: F401

pytestmark = pytest.mark.slow
either = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["row10", "row12"])


@either
def test_10_a_training_by_hand(by_hand, signum):  # noqa: F811
    process = by_hand.stage("train", "trainer.max_epochs=2", at="train 5")
    stage = by_hand.reached(process)
    assert stage.pid == process.pid  # the fault is real: it is in its fifth batch
    os.killpg(process.pid, signum)
    by_hand.go_on()
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signum, printed
    (saved,) = by_hand.checkpoints()
    assert saved.name == "step-00000005.ckpt"  # the batch was ended first
    assert f"{signum.name}: state saved in {saved.relative_to(by_hand.path)}" in printed
    assert "Traceback" not in printed
    assert by_hand.ends() == ["KILLED"]


def test_10_a_pipeline(begun):  # noqa: F811
    locked = begun.text("dvc.lock")
    process = begun.start("dvc", "repro", "--single-item", "train", **begun.striking("train", "train 5"))
    stage = begun.reached(process)
    assert stage.is_running()
    os.killpg(process.pid, signal.SIGTERM)
    begun.go_on()
    printed, _ = process.communicate(timeout=200)
    assert process.returncode
    assert "SIGTERM: state saved in" in printed
    begun.until_nobody_is_left()
    assert begun.text("dvc.lock") == locked
    assert begun.ends()[-1] == "KILLED"
    assert "going on from" in begun.repro("--single-item", "train")
    assert "models/baseline" in begun.text("dvc.lock")


@either
def test_10_twice_in_the_same_batch(by_hand, signum):  # noqa: F811
    process = by_hand.stage("train", *SAVING, at="train 5")
    by_hand.reached(process)
    for _ in range(2):
        process.send_signal(signum)
        by_hand.until(lambda: not pending(process.pid), process)
    by_hand.go_on()
    process.communicate(timeout=200)
    assert process.returncode not in (0, None)
    assert by_hand.checkpoints()[-1].name == "step-00000004.ckpt"  # stopped at once
    assert by_hand.ends() == ["KILLED"]


def pending(pid: int) -> int:
    """Return the bits of the signals that a process has not taken yet; 0 where it is gone."""
    try:
        with Path(f"/proc/{pid}/status").open() as lines:
            return sum(int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd")))
    except FileNotFoundError:
        return 0
