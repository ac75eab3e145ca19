"""Row 17: after a spot notice the work is uploaded inside the two minutes, and another host goes on with it."""

from __future__ import annotations

import hashlib
import signal
import tarfile
from datetime import datetime
from io import BytesIO
from types import SimpleNamespace

import pytest
from agents import PLACE, Agent
from imds import imds  # noqa: F401
from seaweed import _weed, seaweed  # noqa: F401

from cnn_tuning.cloud import attempt, supervise
from cnn_tuning.training import resume

NOTICE_S = 120  # what EC2 gives


@pytest.fixture
def agent(tmp_path, seaweed, imds):  # noqa: F811
    return Agent(tmp_path, seaweed, imds.url)


def saved(agent):
    """Return the files of the newest archive, with its entry."""
    latest = agent.json("checkpoints/latest.json")
    content = agent.store.read(f"{PLACE}/{latest['key']}")
    assert hashlib.sha256(content).hexdigest() == latest["sha256"]
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        return latest, set(archive.getnames())


def test_17_the_times_fit_into_the_notice(monkeypatch):
    """With a training that never ends and an upload that takes all it may."""
    now, sent, times = [0.0], [], supervise.Times()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(supervise, "time", clock)
    monkeypatch.setattr(supervise, "_members", lambda group: [group])
    monkeypatch.setattr(supervise.os, "killpg", lambda group, signum: sent.append(signum))
    supervise.end_group(1, times.grace)
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    assert now[0] > times.grace
    assert times.look_every + now[0] + attempt.SAVING_S < NOTICE_S
    assert times.grace > resume.GRACE_S  # a validation that is given up leaves time for a write


def test_17_the_work_is_uploaded_before_the_host_is_gone(agent, imds):  # noqa: F811
    process = agent.work()
    agent.wait_for(".state/train/begun", process)
    imds.notice()
    printed, _ = process.communicate(timeout=120)
    assert imds.told_at is not None  # the fault is real: the notice was read
    assert process.returncode == 75, printed
    latest, names = saved(agent)
    assert names == {"dvc.lock", ".state/spool/keep", ".state/train/begun", ".state/train/saved"}
    assert datetime.fromisoformat(latest["at"]) < imds.notice_at
    assert agent.calls == ["dvc --wait-for-lock push --quiet"]  # what finished stages made
    state = agent.json("state.json")
    assert (state["state"], state["exit"], state["stage"]) == ("interrupted", 75, "train")
    assert datetime.fromisoformat(state["at"]) < imds.notice_at
    assert "interrupted: " in printed


def test_17_a_training_that_does_not_stop_is_ended_in_time(agent, imds):  # noqa: F811
    process = agent.work("--grace", "1", saves=False)
    agent.wait_for(".state/train/begun", process)
    imds.notice()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert saved(agent)[1] == {"dvc.lock", ".state/spool/keep", ".state/train/begun"}


def test_17_another_host_goes_on_from_there(agent, imds, tmp_path, seaweed):  # noqa: F811
    process = agent.work()
    agent.wait_for(".state/train/begun", process)
    imds.notice()
    process.communicate(timeout=120)
    imds.notice_at = None
    second = Agent(tmp_path / "second", seaweed, imds.url)
    printed, _ = second.start("restore", attempt=1).communicate(timeout=60)
    assert "going on from checkpoints/0001-0.tar.gz" in printed
    assert (second.project / ".state/train/saved").read_text() == "as far as it got"
    done = second.work(seconds=0.1, attempt=1)
    printed, _ = done.communicate(timeout=120)
    assert done.returncode == 0, printed
    assert agent.json("progress.json")["stage"] == "train"


@pytest.mark.slow
def test_17_saving_now_and_then_keeps_two_archives(agent):
    process = agent.work("--save-every", "0.3")
    agent.wait_for(".state/train/begun", process)
    for number in range(1, 4):
        (agent.project / ".state/train/step").write_text(str(number))
        while f"{PLACE}/checkpoints/{number:04d}-0.tar.gz" not in agent.store.keys(PLACE):
            assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGTERM)  # as when the system shuts down
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    kept = [key for key in agent.store.keys(f"{PLACE}/checkpoints/") if key.endswith(".gz")]
    latest = agent.json("checkpoints/latest.json")
    assert kept == [f"{PLACE}/{latest['previous']['key']}", f"{PLACE}/{latest['key']}"]
    assert ".state/train/saved" in saved(agent)[1]
    assert agent.json("state.json")["state"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_17_a_damaged_archive_is_named_and_the_one_before_is_taken(agent, fault):
    for content in ("older", "newer"):
        (agent.project / ".state").mkdir(exist_ok=True)
        (agent.project / ".state/step").write_text(content)
        process = agent.work(seconds=60)
        agent.wait_for(".state/train/begun", process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        (agent.project / ".state/train/begun").unlink()
    key = agent.json("checkpoints/latest.json")["key"]
    if fault == "cut":
        whole = agent.store.read(f"{PLACE}/{key}")
        agent.store.put(f"{PLACE}/{key}", whole[: len(whole) // 2])
    else:
        agent.store.client().delete_object(Bucket="a-bucket", Key=f"{PLACE}/{key}")
    (agent.project / ".state/step").unlink()
    process = agent.start("restore", attempt=1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert key in printed
    assert "falling back to the one before" in printed
    assert (agent.project / ".state/step").read_text() == "older"


def test_17_what_is_uploaded_holds_no_secret(agent, imds):  # noqa: F811
    process = agent.work()
    agent.wait_for(".state/train/begun", process)
    imds.notice()
    printed, _ = process.communicate(timeout=120)
    assert "hunter2" in agent.project.joinpath("stage.py").read_text()  # the stage prints it
    assert "password=***" in printed
    assert "hunter2" not in printed
    assert "password=***" in agent.json("progress.json")["lines"]
