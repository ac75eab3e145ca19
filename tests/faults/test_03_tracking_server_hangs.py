"""Row 3: the tracking server hangs; no step is delayed by more than a second."""

import signal
import time

from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run


def test_steps_go_on(tracking, killable_mlflow_server, tmp_path, rows):
    server = killable_mlflow_server
    database = server.folder / "mlflow.db"
    arrived = "select count(*) from metrics join runs using (run_uuid) where name = 'hangs' and key = 'train/loss'"
    run = Run.start(tracking(uri=server.uri, wait_s=2.0), name="hangs", kind="train", params={})
    slowest, step = 0.0, 0
    hanging_since = None
    deadline = time.monotonic() + 60
    while hanging_since is None or time.monotonic() - hanging_since < 4:
        if hanging_since is None and rows(database, arrived) > [(0,)]:  # it is in the middle of the run
            server.signal(signal.SIGSTOP)
            assert not server.answers(timeout_s=1)
            hanging_since = time.monotonic()
        assert hanging_since or time.monotonic() < deadline
        before = time.monotonic()
        run.log_metrics({"train/loss": float(step)}, step)
        slowest = max(slowest, time.monotonic() - before)
        step += 1
        time.sleep(0.01)
    assert slowest < 1, slowest
    before = time.monotonic()
    assert run.finish().state == "spooled"
    assert time.monotonic() - before < 5
    server.signal(signal.SIGCONT)
    deadline = time.monotonic() + 60
    while sync(tmp_path / "spool")[0].state != "delivered":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    runs = "from runs where name = 'hangs' and lifecycle_stage = 'active'"
    assert rows(database, f"select status {runs}") == [("FINISHED",)]
    stored = (
        f"select step from metrics where key = 'train/loss' and run_uuid in (select run_uuid {runs}) order by step"
    )
    assert rows(database, stored) == [(i,) for i in range(step)]
