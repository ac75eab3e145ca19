"""Row 6: eight deliverers start at once on an empty store; there is one schema and no failure."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnn_tuning.tracking.run import Run

STARTERS = 8


@pytest.mark.slow
def test_one_schema_and_every_run(tracking, tmp_path, rows):
    database = tmp_path / "empty" / "mlflow.db"
    database.parent.mkdir()
    barrier = threading.Barrier(STARTERS)

    def start(number):
        config = tracking(uri=f"sqlite:///{database}", spool=str(tmp_path / f"spool-{number}"), wait_s=120.0)
        barrier.wait()
        # Each spool folder has a deliverer process of its own, and that one is what touches the store.
        with Run.start(config, name=f"starter-{number}", kind="train", params={"number": number}) as run:
            run.log_metrics({"train/loss": number})
            assert not database.exists()
        return run.delivery

    with ThreadPoolExecutor(STARTERS) as pool:
        deliveries = list(pool.map(start, range(STARTERS)))
    assert [delivery.state for delivery in deliveries] == ["delivered"] * STARTERS, deliveries
    assert len({delivery.run_id for delivery in deliveries}) == STARTERS
    assert len(rows(database, "select version_num from alembic_version")) == 1
    assert rows(database, "select count(*) from experiments where name = 'tests'") == [(1,)]
    names = rows(database, "select name from runs where status = 'FINISHED' order by name")
    assert names == [(f"starter-{i}",) for i in range(STARTERS)]
