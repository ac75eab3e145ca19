"""A run whose work goes on after an interruption is one run, here and in the store."""

from __future__ import annotations

import time

import pytest
from filelock import FileLock

from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run

PARAMS = {"seed": 0, "optimizer.learning_rate": 0.01, "model.arguments.widths": [8, 16]}


def interrupted(config, **changes):
    with (
        pytest.raises(SystemExit),
        Run.start(config, **{"name": "train", "kind": "train", "params": PARAMS, **changes}) as run,
    ):
        run.log_metrics({"val/loss": 2.0}, 1)
        raise SystemExit(143)
    return run.key


def again(config, **changes):
    with Run.start(
        config, **{"name": "train", "kind": "train", "params": PARAMS, "goes_on": True, **changes}
    ) as run:
        run.log_metrics({"val/loss": 1.0}, 2)
    return run.key


def deliver(spool, uri=None):
    """Wait for a deliverer that is at work, then deliver."""
    with FileLock(spool / "deliver.lock", timeout=60):
        pass
    assert {run.state for run in sync(spool, uri)} == {"delivered"}


def test_it_is_one_run_with_all_its_values(tracking, tmp_path, store_db, rows):
    config = tracking()
    key = interrupted(config)
    deliver(tmp_path / "spool")
    assert rows(store_db, "select status from runs") == [("KILLED",)]
    assert again(config) == key
    deliver(tmp_path / "spool")
    assert rows(store_db, "select status from runs") == [("FINISHED",)]
    assert rows(store_db, "select step, value from metrics where key = 'val/loss' order by step") == [
        (1, 2.0),
        (2, 1.0),
    ]
    first, last = rows(store_db, "select value from metrics where key = 'time/seconds' order by timestamp")
    assert last > first


def test_it_runs_in_the_store_while_it_goes_on(tracking, tmp_path, store_db, rows):
    config = tracking()
    interrupted(config)
    deliver(tmp_path / "spool")
    with Run.start(config, name="train", kind="train", params=PARAMS, goes_on=True) as run:
        run.log_metrics({"val/loss": 1.0}, 2)
        deadline = time.monotonic() + 60
        while rows(store_db, "select count(*) from metrics where key = 'val/loss'") != [(2,)]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert rows(store_db, "select status from runs") == [("RUNNING",)]
    deliver(tmp_path / "spool")
    assert rows(store_db, "select status from runs") == [("FINISHED",)]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_is_under_way_is_nobody_elses(tracking, resumed):
    config = tracking()
    if resumed:
        interrupted(config)
    with Run.start(config, name="train", kind="train", params=PARAMS, goes_on=resumed) as first:
        assert again(config) != first.key


def test_a_line_that_a_killed_writer_had_begun_costs_nothing(tracking, tmp_path, store_db, rows):
    config = tracking()
    key = interrupted(config)
    deliver(tmp_path / "spool")
    with (tmp_path / "spool" / f"{key}.jsonl").open("ab") as file:
        file.write(b'{"event":"metrics","at":1,"val')
    assert again(config) == key
    deliver(tmp_path / "spool")
    assert rows(store_db, "select status from runs") == [("FINISHED",)]
    assert rows(store_db, "select value from metrics where key = 'val/loss' order by step") == [(2.0,), (1.0,)]


def test_it_is_one_run_in_a_store_that_gets_all_of_it_later(tracking, tmp_path, store_db, rows):
    config = tracking(uri="http://127.0.0.1:9", wait_s=0.1)
    interrupted(config)
    again(config)
    deliver(tmp_path / "spool", f"sqlite:///{store_db}")
    assert rows(store_db, "select status from runs") == [("FINISHED",)]


@pytest.mark.parametrize("changes", [{"params": {"seed": 1}}, {"name": "other"}, {"goes_on": False}])
def test_other_work_is_another_run(tracking, changes):
    config = tracking()
    assert interrupted(config) != again(config, **changes)


def test_a_run_that_had_ended_well_stays_as_it_is(tracking):
    config = tracking()
    assert again(config) != again(config)
