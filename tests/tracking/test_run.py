"""Runs end as they went, carry their facts, and cost the training process next to nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cnn_tuning.errors import CutOff, UserError
from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run

WRITER = """
import sys, time
from cnn_tuning.config import TrackingConfig
from cnn_tuning.tracking.run import Run
config = TrackingConfig(name="t", experiment="tests", uri=sys.argv[1], spool=sys.argv[2], price_per_hour=3600.0)
run = Run.start(config, name="victim", kind="train", params={"seed": 1})
run.log_metrics({"train/loss": 1.0})
print(run.key, flush=True)
time.sleep(60)
"""


def _tags(rows, store_db, name):
    sql = "select t.key, t.value from tags t join runs r using (run_uuid) where r.name = ?"
    return dict(rows(store_db, sql, name))


def _metrics(rows, store_db, name):
    sql = "select m.key, m.value from latest_metrics m join runs r using (run_uuid) where r.name = ?"
    return dict(rows(store_db, sql, name))


def test_everything_that_was_logged_is_in_the_store(tracking, store_db, tmp_path, rows, capfd):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inner.txt").write_text("inner")
    params = {"model.name": "m", "sizes": [1, 2], "none": None, "long": "x" * 7000}
    with Run.start(
        tracking(price_per_hour=3600.0), name="all", kind="train", params=params, tags={"note": "x"}
    ) as run:
        with Run.start(tracking(), name="inner", kind="trial", params={}, parent=run.key) as inner:
            inner.log_metrics({"val/loss": 1.0})
        run.log_metrics({"val/accuracy": 0.5}, step=3)
        run.log_metrics({"bad name #!": 1.0, "val/loss": 2.0})
        run.log_artifact(figure, "plots")
        run.log_artifact(tmp_path / "folder")
        run.log_dataset(name="digits", digest="a" * 64, source="https://host/x", split="train")
        run.log_dataset(name="digits", digest="b" * 64, source="https://host/x", split="test")
        figure.write_bytes(b"changed later")
        time.sleep(5)  # long enough for the system to be sampled
    assert run.delivery.state == "delivered"
    (refused,) = run.delivery.rejected
    assert "bad name #!" in refused
    assert f"which refused 1 event: {refused}" in run.delivery.message
    assert refused in capfd.readouterr().err

    tags, metrics = _tags(rows, store_db, "all"), _metrics(rows, store_db, "all")
    assert tags["cnn_tuning.kind"] == "train"
    assert tags["note"] == "x"
    assert tags["data.train"] == f"digits {'a' * 64}"
    assert "bad name #!" in tags["cnn_tuning.rejected"]
    assert {"git.commit", "package.torch", "hardware.cpu", "hardware.gpu"} <= set(tags)
    assert metrics["val/accuracy"] == 0.5
    assert metrics["val/loss"] == 2.0
    assert metrics["cost/usd"] == pytest.approx(metrics["time/seconds"])
    assert metrics["system/process_memory_usage_megabytes"] > 10
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    sql = "select p.key, p.value from params p join runs r using (run_uuid) where r.name = 'all'"
    stored = dict(rows(store_db, sql))
    assert stored["sizes"] == "[1, 2]"
    assert len(stored["long"]) == 6000
    files = {str(p).partition("artifacts/")[2]: p.read_bytes() for p in (tmp_path / "mlruns").rglob("*.*")}
    assert files == {"plots/figure.png": b"png", "folder/inner.txt": b"inner"}
    digests = rows(store_db, "select digest from datasets order by digest")
    assert digests == [("a" * 36,), ("b" * 36,)]
    assert _tags(rows, store_db, "inner")["mlflow.parentRunId"] == run.delivery.run_id


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (CutOff("rank 1 is gone"), "KILLED"),
        (UserError("no such model"), "FAILED"),
        (ValueError("bad"), "FAILED"),
    ],
)
def test_an_exception_ends_the_run_as_it_went(tracking, store_db, tmp_path, rows, error, status):
    with pytest.raises(type(error)), Run.start(tracking(wait_s=30.0), name="ends", kind="train", params={}):
        raise error
    _wait_for(lambda: rows(store_db, "select status from runs") == [(status,)])
    assert _tags(rows, store_db, "ends")["cnn_tuning.error"].startswith(type(error).__name__)


def test_a_killed_process_leaves_no_running_run(tracking, store_db, tmp_path, rows):
    spool = tmp_path / "spool"
    tracking(spool=str(spool))
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, f"sqlite:///{store_db}", str(spool)], stdout=subprocess.PIPE, text=True
    )
    key = process.stdout.readline().strip()
    _wait_for(lambda: rows(store_db, "select status from runs") == [("RUNNING",)])
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (spool / f"{key}.jsonl").open("a") as file:
        file.write('{"event":"metrics","at":17')  # a line that the kill tore
    _wait_for(lambda: rows(store_db, "select status from runs") == [("KILLED",)])
    assert _metrics(rows, store_db, "victim")["train/loss"] == 1.0
    assert "killed" in _tags(rows, store_db, "victim")["cnn_tuning.error"]


def test_while_a_run_goes_on_its_deliverer_leaves_it_the_machine(tracking, store_db, tmp_path, rows):
    spool = tmp_path / "spool"
    tracking(spool=str(spool))
    bulk = (
        "[run.log_metrics({f'm/{name}': step + name / 100 for name in range(100)}, step) for step in range(600)]"
    )
    script = WRITER.replace('run.log_metrics({"train/loss": 1.0})', bulk).replace(
        "time.sleep(60)", "sys.stdin.readline()\nrun.finish()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, f"sqlite:///{store_db}", str(spool)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    key = process.stdout.readline().strip()

    def arrived():
        return rows(store_db, "select count(*) from metrics where key like 'm/%'")[0][0]

    _wait_for(lambda: arrived() > 0)
    named = [p for p in psutil.process_iter(["cmdline"]) if str(spool) in (p.info["cmdline"] or ())]
    (deliverer,) = (p for p in named if p.pid != process.pid)
    before, began, used = arrived(), time.monotonic(), sum(deliverer.cpu_times()[:2])
    _wait_for(lambda: arrived() > before + 5000)
    share = (sum(deliverer.cpu_times()[:2]) - used) / (time.monotonic() - began)
    assert arrived() < 60_000  # there was more to be had
    assert share < 0.5
    process.communicate("\n", timeout=60)
    _wait_for(lambda: rows(store_db, "select status from runs where name = 'victim'") == [("FINISHED",)])
    assert (arrived(), key in {path.stem for path in spool.glob("*.jsonl")}) == (60_000, True)


def test_a_spool_from_elsewhere_goes_to_the_store_that_is_named(tracking, store_db, tmp_path, rows):
    with Run.start(
        tracking(uri="http://127.0.0.1:1", wait_s=1.0), name="far", kind="train", params={"seed": 1}
    ) as run:
        run.log_metrics({"train/loss": 1.0})
    assert run.delivery.state == "spooled"
    (row,) = sync(tmp_path / "spool", f"sqlite:///{store_db}")
    assert (row.state, row.name, row.uri) == ("delivered", "far", f"sqlite:///{store_db}")
    assert _metrics(rows, store_db, "far")["train/loss"] == 1.0


def test_training_does_not_import_mlflow(tracking, store_db, tmp_path):
    script = WRITER.replace(
        "time.sleep(60)", "run.finish(); assert not {'mlflow', 'torch', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, f"sqlite:///{store_db}", str(tmp_path / "spool")], check=True)
    tracking()


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("mlruns", "no tracking store"),
        ("file:///x/mlruns", "no tracking store"),
        ("sqlite:////no/such/x.db", "no folder"),
    ],
)
def test_a_wrong_uri_stops_before_any_work(tracking, uri, named):
    with pytest.raises(UserError, match=named):
        Run.start(tracking(uri=uri, on_unreachable="stop"), name="n", kind="train", params={})


def test_an_unwritable_spool_is_named(tracking, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"tracking\.spool"):
        Run.start(tracking(spool=str(tmp_path / "file" / "spool")), name="n", kind="train", params={})


def test_a_metric_costs_microseconds_and_is_one_line_of_json(tracking, tmp_path):
    with Run.start(tracking(), name="json", kind="train", params={"path": Path("x")}) as run:
        run.log_metrics({"train/loss": float("inf")})
        began = time.perf_counter()
        for step in range(1000):
            run.log_metrics({"train/loss": 0.5, "train/accuracy": 0.5}, step)
        assert (time.perf_counter() - began) / 1000 < 0.001
    for line in (tmp_path / "spool" / f"{run.key}.jsonl").read_text().splitlines():
        assert {"event", "at"} <= set(json.loads(line))


def _wait_for(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
