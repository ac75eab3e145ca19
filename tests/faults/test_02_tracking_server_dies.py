"""Row 2: the tracking server dies during training; the spool replays later without loss or duplicates."""

import time

import pytest

from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run

STEPS = 400


@pytest.mark.slow
def test_everything_arrives_once_after_the_server_is_back(tracking, killable_mlflow_server, tmp_path, rows):
    server = killable_mlflow_server
    database = server.folder / "mlflow.db"
    run = Run.start(tracking(uri=server.uri), name="dies", kind="train", params={"seed": 1})
    for step in range(STEPS):
        run.log_metrics({"train/loss": 1 / (step + 1)}, step)
        if step == STEPS // 2:
            _wait_until(lambda: rows(database, "select count(*) from metrics where key = 'train/loss'")[0][0] > 0)
            server.kill()
            assert not server.answers()
    file = tmp_path / "notes.txt"
    file.write_text("written while the server was dead")
    run.log_artifact(file, "notes")
    delivery = run.finish()
    assert delivery.state == "spooled", delivery
    assert server.uri in delivery.message
    before = rows(database, "select count(*) from metrics where key = 'train/loss'")[0][0]
    assert 0 < before < STEPS

    server.start()
    for _ in range(2):  # a second replay changes nothing
        (row,) = sync(tmp_path / "spool")
        assert (row.state, row.message) == ("delivered", "")
        stored = rows(database, "select step, value from metrics where key = 'train/loss' order by step")
        assert stored == [(step, 1 / (step + 1)) for step in range(STEPS)]
        assert rows(database, "select status from runs") == [("FINISHED",)]
    assert [p.read_text() for p in server.folder.rglob("artifacts/**/notes.txt")] == [file.read_text()]


def test_a_replay_from_the_beginning_leaves_no_trace(tracking, tmp_path, store_db, rows):
    with Run.start(tracking(), name="twice", kind="train", params={"seed": 1}) as run:
        for step in range(50):
            run.log_metrics({"train/loss": step / 7, "train/broken": float("nan")}, step)
        run.log_dataset(name="digits", digest="d" * 36, source="file:digits", split="train")
    assert run.delivery.state == "delivered"
    _wait_until(lambda: not _held(tmp_path / "spool" / "deliver.lock"))
    tables = ("metrics", "params", "tags", "inputs", "runs")
    counts = [rows(store_db, f"select count(*) from {table}") for table in tables]
    assert all(count > 0 for ((count,),) in counts)
    (tmp_path / "spool" / f"{run.key}.delivery.json").unlink()  # as if no answer had ever been noted
    (row,) = sync(tmp_path / "spool")
    assert (row.state, row.message, row.run_id) == ("delivered", "", run.delivery.run_id)
    assert [rows(store_db, f"select count(*) from {table}") for table in tables] == counts


def _held(path):
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
