"""Row 5: eight processes log to one SQLite store, by one deliverer and by eight; every metric is there."""

import multiprocessing
import time

import pytest
from filelock import FileLock

from cnn_tuning.tracking.run import Run

WRITERS, STEPS = 8, 100
# Far more than it takes: only a writer that hangs is to fail for its time, not a busy machine.
LIMIT_S = 540


def _write(number, config, barrier):
    barrier.wait(LIMIT_S)
    with Run.start(config, name=f"writer-{number}", kind="train", params={"number": number}) as run:
        for step in range(STEPS):
            run.log_metrics({"train/loss": number + step / STEPS}, step)
    assert run.delivery.state == "delivered", run.delivery


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_metric_is_present(tracking, store_db, tmp_path, rows, own):
    """With a spool of its own each, eight deliverers write to the database at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(WRITERS)
    spools = [tmp_path / (f"spool-{i}" if own else "spool") for i in range(WRITERS)]
    configs = [tracking(wait_s=LIMIT_S, spool=str(spool)) for spool in spools]
    processes = [
        context.Process(target=_write, args=(i, config, barrier), daemon=True) for i, config in enumerate(configs)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    assert [process.exitcode for process in processes] == [0] * WRITERS
    for spool in spools:
        with FileLock(spool / "deliver.lock", timeout=60):  # its deliverer has left
            pass
    stored = rows(
        store_db,
        "select r.name, m.step, m.value from metrics m join runs r using (run_uuid) where key = 'train/loss'",
    )
    expected = [(f"writer-{n}", step, n + step / STEPS) for n in range(WRITERS) for step in range(STEPS)]
    assert sorted(stored) == sorted(expected)
    assert rows(store_db, "select status, count(*) from runs group by status") == [("FINISHED", WRITERS)]
