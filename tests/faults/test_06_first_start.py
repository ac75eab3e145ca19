"""Row 6: eight processes, each with a deliverer of its own, start at once on an empty store."""

import multiprocessing

from cnn_tuning.config import TrackingConfig
from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run

STARTERS = 8


def _start(number, uri, spool, barrier):
    config = TrackingConfig(name="t", experiment="first", uri=uri, spool=spool, wait_s=90.0)
    barrier.wait()
    with Run.start(config, name=f"starter-{number}", kind="train", params={"number": number}) as run:
        run.log_metrics({"train/loss": number})


def test_one_schema_and_every_run(tmp_path, rows):
    database = tmp_path / "mlflow.db"
    assert not database.exists()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(STARTERS)
    spools = [tmp_path / f"spool-{i}" for i in range(STARTERS)]
    arguments = [(i, f"sqlite:///{database}", str(spool), barrier) for i, spool in enumerate(spools)]
    processes = [context.Process(target=_start, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * STARTERS
    states = [row.state for spool in spools for row in sync(spool)]
    assert states == ["delivered"] * STARTERS
    assert len(rows(database, "select version_num from alembic_version")) == 1
    assert rows(database, "select count(*) from experiments where name = 'first'") == [(1,)]
    names = rows(database, "select name from runs where status = 'FINISHED' order by name")
    assert names == [(f"starter-{i}",) for i in range(STARTERS)]
