"""A run whose work goes on after an interruption is one run, here and in the store."""

from __future__ import annotations

import json
import platform
import shutil
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


def written(spool, key):
    lines = (spool / f"{key}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def cut_off_on_another_host(config, spool):
    """Leave what is found of a run of 100 s whose host vanished: its last event, and no end."""
    key = interrupted(config)
    deliver(spool)
    start, *events = written(spool, key)[:-2]
    start["at"] = events[0]["at"] = events[-1]["at"] - 100_000
    whole = [start | {"host": "elsewhere"}, *events]
    (spool / f"{key}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in whole))
    return key


def test_the_time_on_a_host_that_vanished_counts_at_that_hosts_price(tracking, tmp_path):
    config, spool = tracking(price_per_hour=3600.0), tmp_path / "spool"
    key = cut_off_on_another_host(config, spool)
    assert again(tracking(price_per_hour=36000.0)) == key
    ended = written(spool, key)[-2]["values"]
    assert 100 < ended["time/seconds"] < 110
    assert ended["cost/usd"] == pytest.approx(100 + 10 * (ended["time/seconds"] - 100))


def test_a_pause_between_costs_nothing_also_where_the_run_then_dies(tracking, tmp_path, store_db, rows):
    config, spool = tracking(price_per_hour=3600.0), tmp_path / "spool"
    key = cut_off_on_another_host(config, spool)
    events = written(spool, key)
    resumed = {"event": "resume", "at": events[-1]["at"] + 10**9, "price_per_hour": 36000.0, "pid": 1}
    last = {"event": "metrics", "at": resumed["at"] + 5_000, "step": 9, "values": {"val/loss": 0.5}}
    for event in (resumed | {"created": 0.0, "host": platform.node()}, last):
        with (spool / f"{key}.jsonl").open("a") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")
    (spool / f"{key}.delivery.json").unlink()
    other = tmp_path / "other.db"
    shutil.copy(store_db, other)
    sync(spool, f"sqlite:///{other}")
    sql = "select key, value from latest_metrics where key in ('time/seconds', 'cost/usd')"
    assert dict(rows(other, sql)) == {"time/seconds": 105.0, "cost/usd": 150.0}


def test_a_run_that_had_ended_well_stays_as_it_is(tracking):
    config = tracking()
    assert again(config) != again(config)
