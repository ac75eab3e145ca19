"""Row 5: eight processes log to one SQLite store; every metric is there."""

import multiprocessing
import time

import pytest

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
def test_every_metric_is_present(tracking, store_db, rows):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(WRITERS)
    config = tracking(wait_s=LIMIT_S)
    processes = [context.Process(target=_write, args=(i, config, barrier), daemon=True) for i in range(WRITERS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    assert [process.exitcode for process in processes] == [0] * WRITERS
    stored = rows(
        store_db,
        "select r.name, m.step, m.value from metrics m join runs r using (run_uuid) where key = 'train/loss'",
    )
    expected = [(f"writer-{n}", step, n + step / STEPS) for n in range(WRITERS) for step in range(STEPS)]
    assert sorted(stored) == sorted(expected)
    assert rows(store_db, "select status, count(*) from runs group by status") == [("FINISHED", WRITERS)]
