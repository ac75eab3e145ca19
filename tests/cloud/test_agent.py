"""The host's agent: what it archives and restores, and how it ends with its pipeline."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import tarfile
import threading
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import pytest
from agents import PLACE, Agent, attempt_of
from hypothesis import given
from hypothesis import strategies as st
from seaweed import BUCKET, REGION, _weed, seaweed  # noqa: F401

from cnn_tuning.cloud.checkpoint import pack, unpack
from cnn_tuning.cloud.supervise import Ended
from cnn_tuning.config import compose, lock_text

ROOT = Path(__file__).parents[2]
NAMES = st.text(st.sampled_from("abc ö-_."), min_size=1, max_size=6).filter(lambda name: name.strip("."))
FILES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: "/".join(parts)), st.binary(max_size=50), max_size=6
).filter(lambda files: not any(PurePosixPath(a) in PurePosixPath(b).parents for a in files for b in files))


@given(FILES)
def test_what_is_packed_comes_back_the_same(files):
    with TemporaryDirectory() as scratch:
        here, there = Path(scratch) / "here", Path(scratch) / "there"
        for name, content in files.items():
            path = here / ".state" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        here.mkdir(exist_ok=True)
        (here / ".env").write_text("AWS_SECRET_ACCESS_KEY=secret")
        there.mkdir()
        pack(here, Path(scratch) / "archive")
        unpack(Path(scratch) / "archive", there)
        back = {str(p.relative_to(there / ".state")): p.read_bytes() for p in there.rglob("*") if p.is_file()}
        assert back == files


def test_halves_and_locks_stay_where_they_are_and_a_torn_line_is_cut(tmp_path):
    spool = tmp_path / "here/.state/spool"
    spool.mkdir(parents=True)
    for name in ("deliver.lock", "step.partial"):
        (spool / name).touch()
    (spool / "run.jsonl").write_text('{"event": "start"}\n{"event": "met')
    (spool / "link").symlink_to("/etc/passwd")
    features = tmp_path / "here/.state/features/key"  # larger than all the rest, perhaps, and made again
    features.mkdir(parents=True)
    (features / "large").write_bytes(bytes(1000))
    pack(tmp_path / "here", tmp_path / "archive")
    unpack(tmp_path / "archive", tmp_path / "there")
    [only] = [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    assert only.read_text() == '{"event": "start"}\n'


@pytest.fixture
def attempt(tmp_path, seaweed):  # noqa: F811
    """An attempt in this process, with unfinished work, a spool, and a DVC that has nothing to do."""
    project = tmp_path / "project"
    (project / ".state/spool").mkdir(parents=True)
    (project / ".state/step").write_text("0")
    (project / ".state/spool/one.jsonl").write_text("{}\n")
    return attempt_of(project, seaweed)


@contextlib.contextmanager
def while_uploading(attempt, does):
    """Let something happen whenever an archive is about to be sent."""

    def about(model, params, **_):
        if "/checkpoints/" in params["url_path"] and params["url_path"].endswith(".gz"):
            does()

    events = attempt.folder.s3.meta.events
    events.register("before-call.s3.PutObject", about)
    try:
        yield
    finally:
        events.unregister("before-call.s3.PutObject", about)


def test_two_archives_at_a_time_are_two(attempt, seaweed):  # noqa: F811
    both = threading.Barrier(2)

    def does():
        (attempt.project / ".state/step").write_text("one more")
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # the other one is here, too, if nothing keeps it out

    with while_uploading(attempt, does):
        threads = [threading.Thread(target=attempt.archive) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    kept = [key for key in seaweed.keys(f"{PLACE}/checkpoints/") if key.endswith(".gz")]
    assert kept == [f"{PLACE}/checkpoints/000{number}-0.tar.gz" for number in (1, 2)]


def test_an_archive_that_takes_too_long_costs_the_results_nothing(attempt, seaweed, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("cnn_tuning.cloud.attempt.SAVING_S", 1.0)
    released = threading.Event()
    with while_uploading(attempt, lambda: released.wait(60)):
        assert attempt.conclude(Ended("notice", -15)) == 75
        assert json.loads(seaweed.read(f"{PLACE}/state.json"))["state"] == "interrupted"
        assert seaweed.read(f"{PLACE}/spool/one.jsonl") == b"{}\n"
        assert f"{PLACE}/checkpoints/latest.json" not in seaweed.keys(PLACE)  # the fault is real
        released.set()
    assert "not uploaded within 1 s: checkpoint" in capsys.readouterr().err


def test_work_that_ends_well_is_saved_too(attempt, seaweed):  # noqa: F811
    assert attempt.conclude(Ended("ended", 0)) == 0
    assert f"{PLACE}/checkpoints/latest.json" in seaweed.keys(PLACE)
    assert seaweed.read(f"{PLACE}/spool/one.jsonl") == b"{}\n"


def test_a_pipeline_that_fails_keeps_its_status_and_its_work(tmp_path, seaweed):  # noqa: F811
    agent = Agent(tmp_path, seaweed)
    fails = (
        "import pathlib; pathlib.Path('.state').mkdir(exist_ok=True); "
        "pathlib.Path('.state/half').touch(); raise SystemExit(3)"
    )
    process = agent.start("run", "--", sys.executable, "-c", fails)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 3, printed
    archive = seaweed.read(f"{PLACE}/{agent.json('checkpoints/latest.json')['key']}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        assert ".state/half" in opened.getnames()
    assert agent.calls == ["dvc --wait-for-lock push --quiet"]
    assert not (tmp_path / "told.json").exists()  # `boot.sh` says that it failed, and where


@pytest.mark.parametrize(
    ("attempt", "dearest", "price"),
    [(0, "3600", 0.42), (1, "3600", 3600.0), (1, None, 0.0)],
    ids=["noted", "not noted yet", "not known"],
)
def test_the_pipeline_knows_what_the_host_costs(tmp_path, seaweed, attempt, dearest, price):  # noqa: F811
    agent = Agent(tmp_path, seaweed)
    configured = compose(["tracking.price_per_hour=0.01"], params=None, conf=ROOT / "conf")
    (agent.project / "params.lock.yaml").write_text(lock_text(configured))
    seaweed.put(f"{PLACE}/run.json", b'{"hosts": [{"attempt": 0, "per_hour": 0.42}]}')
    tells = "from cnn_tuning.config import *; print('price', load_locked(Config).tracking.price_per_hour)"
    process = agent.start("run", "--", sys.executable, "-c", tells, attempt=attempt, price=dearest)
    printed, _ = process.communicate(timeout=60)
    assert f"price {price}\n" in printed


def test_the_last_word_of_an_idle_host_stays(tmp_path, seaweed):  # noqa: F811
    agent = Agent(tmp_path, seaweed)
    seaweed.put(f"{PLACE}/state.json", b'{"state": "idle"}')
    (tmp_path / "told.json").write_text('{"state": "idle"}')
    process = agent.work()
    agent.wait_for(".state/train/begun", process)
    process.send_signal(signal.SIGTERM)  # of the system that shuts down
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert (agent.project / ".state/train/saved").exists()
    assert agent.json("state.json") == {"state": "idle"}


def test_an_archive_that_leads_out_of_the_project_is_not_unpacked(tmp_path, seaweed):  # noqa: F811
    import hashlib

    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../canary"), io.BytesIO())
    content = made.getvalue()
    entry = {"key": "checkpoints/0001-0.tar.gz", "sha256": hashlib.sha256(content).hexdigest(), "previous": None}
    seaweed.put(f"{PLACE}/{entry['key']}", content)
    seaweed.put(f"{PLACE}/checkpoints/latest.json", json.dumps(entry).encode())
    agent = Agent(tmp_path, seaweed)
    process = agent.start("restore")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not (tmp_path / "canary").exists()
    assert printed.startswith(f"error: {entry['key']} holds what is no work of a run")
    assert "Traceback" not in printed


@pytest.mark.parametrize("text", [b"{", b"<html>"])
def test_a_note_that_is_no_json_is_named(tmp_path, seaweed, text):  # noqa: F811
    seaweed.put(f"{PLACE}/checkpoints/latest.json", text)
    process = Agent(tmp_path, seaweed).start("restore")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed == f"error: s3://a-bucket/{PLACE}/checkpoints/latest.json is no JSON\n"
