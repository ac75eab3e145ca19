"""Row 28: two `dvc repro` at once, an emptied lock file; who holds the lock is said, the remedy is printed."""

from __future__ import annotations

import pytest
from striking import _begun, begun  # noqa: F401

pytestmark = pytest.mark.slow
RWLOCK = ".dvc/tmp/rwlock"


def test_28_the_second_says_who_holds_the_lock(begun):  # noqa: F811
    first = begun.start("dvc", "repro", "--single-item", "train", **begun.striking("train", "train 5"))
    stage = begun.reached(first)
    second = begun.run("dvc", "repro", "--single-item", "train", fails=True)
    assert stage.is_running()  # the fault is real
    assert f"(PID {first.pid}): " in second
    assert "is busy" in second
    told = begun.run("cnn-tuning", "doctor", "--locks")
    assert f"process {first.pid} " in told
    begun.go_on()
    printed, _ = first.communicate(timeout=200)
    assert first.returncode == 0, printed
    assert begun.run("cnn-tuning", "doctor", "--locks") == ""
    assert "didn't change" in begun.repro("--single-item", "train")


@pytest.mark.parametrize(
    ("file", "remedy"), [(RWLOCK, f"rm {RWLOCK}"), ("dvc.lock", "git checkout dvc.lock")], ids=["rwlock", "lock"]
)
@pytest.mark.parametrize("content", ["", '{"schema'], ids=["emptied", "cut"])
def test_28_the_remedy_of_a_damaged_lock_is_printed_and_helps(begun, file, remedy, content):  # noqa: F811
    (begun.path / file).write_text(content)
    # Its own mark that all is installed, never a link to the environment of these tests: make writes to it.
    (begun.path / ".venv").mkdir()
    (begun.path / ".venv/.ready").touch()
    printed = begun.run("make", "repro", fails=True)
    assert "installing" not in printed
    assert f"`{remedy}`" in printed
    begun.run(*remedy.split())
    assert begun.run("cnn-tuning", "doctor", "--locks") == ""
    assert "didn't change" in begun.repro("--single-item", "preprocess")
