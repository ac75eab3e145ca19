"""`cnn-tuning compare`: what was recorded, in store or spool, becomes rows that can be set side by side."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from project import ROOT
from rich.console import Console

from cnn_tuning.cli import cli
from cnn_tuning.config import TrackingConfig
from cnn_tuning.errors import UserError
from cnn_tuning.reports.compared import Compared, notes, print_compared
from cnn_tuning.stages.compare import compared
from cnn_tuning.tracking import spool
from cnn_tuning.tracking.run import Run

HERE, THERE = "a" * 40, "b" * 40
CPU = {
    "hardware.cpu": "Intel(R) Xeon(R) CPU @ 2.30GHz",
    "hardware.cores": "2",
    "hardware.gpu": "none",
    "device": "cpu",
}
GPU = {"cnn_tuning.host": "g5.xlarge spot", "hardware.gpu": "NVIDIA A10G", "device": "cuda:0"}
VAL = {"best/val_accuracy": 0.9, "val/images": 100.0, "val/accuracy": 0.8}
TEST = {"test/accuracy": 0.95, "test/accuracy_low": 0.93, "test/accuracy_high": 0.97}


@pytest.fixture
def record(tmp_path):
    """Return a function that writes a run to the spool as a stage does, without delivering it."""

    def write(key, kind, metrics, *, parent=None, commit=HERE, price=0.0, status="FINISHED", data="x", **tags):
        writer = spool.Writer(tmp_path / "spool", key)
        every = {"cnn_tuning.kind": kind, "git.commit": commit, "git.dirty": "false"}
        every |= {"cnn_tuning.price_per_hour": str(price), **tags}
        writer.append(
            "start", name=key, kind=kind, experiment="tests", parent=parent, tags=every, host="elsewhere"
        )
        writer.append("params", values={"experiment": "digits", "seed": 0})
        writer.append("dataset", name="digits", digest=data, source="s", split="train")
        writer.append("metrics", step=0, values=metrics)
        if status:
            writer.append("finish", status=status, error="")
        writer.close()

    return write


@pytest.fixture
def config(tmp_path) -> TrackingConfig:
    return TrackingConfig(
        name="t", experiment="tests", uri=f"sqlite:///{tmp_path}/none.db", spool=str(tmp_path / "spool")
    )


def test_what_belongs_to_a_run_is_in_its_row_and_no_dollar_counts_twice(record, config):
    spent = {"time/seconds": 36.0, "cost/usd": 0.01}
    record("1-train", "train", VAL | spent | {"time/samples_per_second": 1000.0}, price=1.0, **CPU)
    record("2-evaluate", "evaluate", TEST | spent, parent="1-train", price=1.0)
    record("3-tune", "tune", {"time/seconds": 360.0, "cost/usd": 0.1}, price=1.0, **GPU)
    record("4-trial", "trial", spent, parent="3-tune", price=1.0)
    record(
        "5-refit", "refit", VAL | spent | {"time/samples_per_second": 9000.0}, parent="3-tune", price=1.0, **GPU
    )
    record("6-refit", "refit", VAL | spent, parent="3-tune", price=1.0, **GPU)
    record("7-evaluate", "evaluate", {**TEST, "test/accuracy": 0.96}, parent="5-refit", price=1.0)
    train, tune = compared(config, commit=HERE)
    assert (train.kind, train.host, train.device, train.experiment) == (
        "train",
        "Intel Xeon, 2 cores",
        "cpu",
        "digits",
    )
    assert (train.split, train.accuracy, train.accuracy_low, train.accuracy_high) == ("test", 0.95, 0.93, 0.97)
    assert (tune.host, tune.device, tune.split, tune.accuracy) == ("g5.xlarge spot", "NVIDIA A10G", "test", 0.96)
    assert (train.samples_per_second, tune.samples_per_second) == (1000, 9000)
    assert (train.usd, tune.usd) == (0.01, 0.1)


def test_a_validation_accuracy_is_that_of_the_kept_epoch_and_marked(record, config, capsys):
    record("1-train", "train", VAL, **CPU)
    record("2-train", "train", {"val/accuracy": 0.7}, **CPU)
    record("3-train", "train", VAL, status="KILLED", **CPU)
    kept, last, killed = compared(config, commit=HERE)
    assert (kept.split, kept.accuracy) == ("val", 0.9)
    # Wilson's interval of 90 of 100, as tables have it.
    assert (kept.accuracy_low, kept.accuracy_high) == (
        pytest.approx(0.8256, abs=1e-4),
        pytest.approx(0.9448, abs=1e-4),
    )
    assert (last.accuracy, last.accuracy_low) == (0.7, None)
    assert killed.accuracy is None
    print_compared([kept, last, killed], Console(width=120))
    printed = capsys.readouterr().out
    assert "90.00v [82.56, 94.48]" in printed
    assert "3-train (killed)" in printed
    assert "biased upwards" in printed


def test_only_runs_of_the_commit_are_shown_unless_all_are_asked_for(record, config):
    record("1-train", "train", VAL, commit=HERE)
    record("2-train", "train", VAL, commit=THERE)
    snapshot = {"git.snapshot_of": HERE}
    record("3-train", "train", VAL, commit="c" * 40, **snapshot, **GPU)
    record("4-train", "train", VAL, commit=THERE)
    record("5-evaluate", "evaluate", TEST, commit=HERE, parent="4-train")  # measured anew by this commit's code
    assert [row.name for row in compared(config, commit=HERE)] == ["1-train", "3-train", "4-train"]
    assert [row.dirty for row in compared(config, commit=HERE)] == [False, True, False]
    rows = compared(config, every=True)
    assert len(rows) == 4
    assert any("2 commits" in note for note in notes(rows))
    with pytest.raises(UserError, match=r"no run of commit dddddddddddd; there are runs of bbbbbbbbbbbb \(2\)"):
        compared(config, commit="d" * 40)


def test_the_default_is_the_present_commit(record, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record("1-train", "train", VAL)
    with pytest.raises(UserError, match="no Git repository"):
        compared(config)
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *who, "commit", "-qm", "x", "--allow-empty"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    record("2-train", "train", VAL, commit=head)
    assert [row.name for row in compared(config)] == ["2-train"]
    assert [row.name for row in compared(config, commit=head[:8])] == ["2-train"]
    with pytest.raises(UserError, match="Git knows no commit 0123456"):
        compared(config, commit="0123456")


def test_named_runs_may_be_of_any_kind(record, config):
    record("1-tune", "tune", {})
    record("20260101-000000-trial-0a1b2c3d", "trial", VAL, parent="1-tune", commit=THERE)
    (row,) = compared(config, ["0a1b2c3d"])
    assert row.kind == "trial"
    with pytest.raises(UserError, match=r"no run nothing; the latest are .*0a1b2c3d"):
        compared(config, ["nothing"])


def test_without_any_run_or_of_another_experiment_it_says_what_there_is(record, config):
    with pytest.raises(UserError, match="no run is recorded in experiment tests yet"):
        compared(config)
    record("1-train", "train", VAL)
    with pytest.raises(UserError, match=r"of experiment mnist; there are runs of digits \(1\)"):
        compared(config, commit=HERE, experiment="mnist")
    assert len(compared(config, commit=HERE, experiment="digits")) == 1


def test_different_data_is_told(record, config):
    record("1-train", "train", VAL, data="x")
    record("2-train", "train", VAL, data="y")
    assert any("Different data in digits" in note for note in notes(compared(config, commit=HERE)))


def test_a_delivered_run_has_the_row_that_it_had_in_the_spool(tracking, store_db, tmp_path):
    config = tracking(price_per_hour=3600.0)
    with Run.start(config, name="train x", kind="train", params={"seed": 3}, already_s=100.0) as run:
        run.log_dataset(name="digits", digest="d" * 32, source="s", split="train")
        run.log_metrics({"val/accuracy": 0.1}, step=1)
        run.log_metrics(VAL, step=2)
        run.set_tags({"device": "cpu"})
        with Run.start(
            config, name="evaluate x", kind="evaluate", params={}, parent=run.key, waits=False
        ) as inner:
            inner.log_metrics(TEST)
    assert run.delivery.state == "delivered"
    (stored,) = compared(config, every=True)
    # Another store, that nothing was delivered to: the same spool stands for itself.
    elsewhere = tracking(price_per_hour=3600.0, uri=f"sqlite:///{tmp_path}/other.db")
    (spooled,) = compared(elsewhere, every=True)
    assert stored.run == run.delivery.run_id
    assert spooled.run == run.key
    same = (
        "name",
        "status",
        "data",
        "seed",
        "commit",
        "host",
        "device",
        "split",
        "accuracy",
        "accuracy_low",
        "usd",
    )
    assert [getattr(stored, name) for name in same] == [getattr(spooled, name) for name in same]
    assert stored.accuracy == 0.95
    assert stored.usd == pytest.approx(stored.seconds)  # a dollar a second
    assert stored.seconds > 100  # what was done before the run was opened counts


def test_the_command_writes_what_it_shows(record, config, tmp_path, monkeypatch):
    record("1-train", "train", VAL | {"time/seconds": 1.5, "cost/usd": 0.25}, price=600.0, **CPU)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    settings = {"experiment": "tests", "uri": config.uri, "spool": config.spool}
    Path("params.yaml").write_text(json.dumps({"experiment": "digits", "seed": 0, "tracking": settings}))
    arguments = ["compare", "--commit", HERE, "--csv", "runs.csv"]
    told = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    (row,) = json.loads(told.stdout)
    assert (row["run"], row["usd"], row["accuracy"]) == ("1-train", 0.25, 0.9)
    with Path("runs.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line == {name: "" if value is None else str(value) for name, value in row.items()}
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False, env={"COLUMNS": "80"}).stdout
    assert "runs.csv: 1 rows" in shown
    assert all(part in shown for part in ("1-train", "90.00v", "Intel Xeon", "1.5 s", "0.25"))


SHARE = st.one_of(st.none(), st.floats(0, 1))
AMOUNT = st.one_of(st.none(), st.floats(0, 1e5))
WORDS = st.lists(
    st.sampled_from(["train", "compact_cnn_small", "seed", "0", "efficientnet"]), min_size=1, max_size=6
)
ROWS = st.builds(
    Compared,
    run=st.sampled_from(["d30f8e63aa", "20260101-000000-train-0a1b2c3d"]),
    name=WORDS.map(" ".join),
    kind=st.just("train"),
    status=st.sampled_from(["FINISHED", "KILLED"]),
    experiment=st.just("digits"),
    data=st.just(""),
    seed=st.just("0"),
    commit=st.sampled_from([HERE, THERE]),
    dirty=st.booleans(),
    host=st.sampled_from(["g5.xlarge", "AMD EPYC 7R13 Processor with a long name, 192 cores"]),
    device=st.sampled_from(["cpu", "NVIDIA A10G", ""]),
    split=st.sampled_from(["test", "val"]),
    accuracy=SHARE,
    accuracy_low=SHARE,
    accuracy_high=SHARE,
    seconds=AMOUNT,
    samples_per_second=AMOUNT,
    price_per_hour=st.floats(0, 100),
    usd=AMOUNT,
    started=st.just(0.0),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=4), width=st.sampled_from([80, 100, 120, 160]))
def test_the_table_fits_its_terminal_and_nothing_is_cut_off(rows, width):
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        print_compared(rows, console)
    table = captured.get().partition("together")[0].splitlines()[:-1]
    assert all(len(line.rstrip()) <= width for line in table)
    assert "…" not in "".join(table)
    flat = "".join("".join(table).split())
    for row in rows:
        if row.accuracy is not None:
            assert f"{100 * row.accuracy:.2f}" in flat
