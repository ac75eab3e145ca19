"""What a run logged as files leaves the spool once the run's own store has it, and not before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from cnn_tuning.cloud.attempt import Attempt
from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run, attach


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "page.html"
    path.write_text("first")
    return path


def left(tmp_path: Path, key: str) -> list[str]:
    """Return the files of a run in the spool, once no deliverer is at work."""
    with FileLock(tmp_path / "spool/deliver.lock", timeout=60):
        return sorted(p.read_text() for p in (tmp_path / "spool" / key / "files").rglob("*.*"))


def stored(tmp_path: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in (tmp_path / "mlruns").rglob("*.html")}


def logged(config, page: Path) -> Run:
    with Run.start(config, name="n", kind="train", params={}) as run:
        run.log_artifact(page)
    return run


def test_files_of_a_delivered_run_are_removed_and_its_events_stay(tracking, tmp_path, page):
    run = logged(tracking(), page)
    assert left(tmp_path, run.key) == []
    assert stored(tmp_path) == {"page.html": "first"}
    assert '"event":"artifact"' in (tmp_path / f"spool/{run.key}.jsonl").read_text()


def test_a_file_on_the_outcome_joins_a_run_that_has_ended(tracking, tmp_path, page, store_db, rows):
    run = logged(tracking(), page)
    assert left(tmp_path, run.key) == []
    other = page.with_name("outcome.html")
    other.write_text("second")
    attach(tracking(), [run.delivery], other)
    assert left(tmp_path, run.key) == []
    assert stored(tmp_path) == {"page.html": "first", "outcome.html": "second"}
    assert '"files/2/outcome.html"' in (tmp_path / f"spool/{run.key}.jsonl").read_text()
    assert rows(store_db, "select status from runs") == [("FINISHED",)]


def test_a_store_that_is_not_the_runs_own_takes_nothing_away(tracking, tmp_path, page, store_db):
    run = logged(tracking(uri="http://127.0.0.1:9", wait_s=0.1), page)
    with FileLock(tmp_path / "spool/deliver.lock", timeout=60):
        pass
    assert {row.state for row in sync(tmp_path / "spool", f"sqlite:///{store_db}")} == {"delivered"}
    assert left(tmp_path, run.key) == ["first"]


def test_another_store_is_told_what_it_does_not_get(tracking, tmp_path, page, store_db):
    run = logged(tracking(), page)
    assert left(tmp_path, run.key) == []
    other = shutil.copy(store_db, tmp_path / "other.db")
    (row,) = sync(tmp_path / "spool", f"sqlite:///{other}")
    assert row.state == "delivered"
    assert "page.html is no longer in the spool" in row.message


def test_a_hosts_spool_keeps_files_for_the_store_at_home(tracking, tmp_path, page):
    project = tmp_path / "host"
    Attempt.keep_files(Attempt(None, "", 1, Path(), 0.0, project=project))
    (tmp_path / "spool").symlink_to(project / ".state/spool")
    run = logged(tracking(), page)
    assert run.delivery.state == "delivered"
    assert left(tmp_path, run.key) == ["first"]


def test_a_start_reads_little_of_what_was_delivered_long_ago(tracking, tmp_path, page):
    run = logged(tracking(), page)
    assert left(tmp_path, run.key) == []
    events = tmp_path / f"spool/{run.key}.jsonl"
    # Unreadable after the first line, and as long: whoever reads on stumbles.
    first, rest = events.read_bytes().split(b"\n", 1)
    events.write_bytes(first + b"\n" + b'"event":"resume"' + b"x" * (len(rest) - 17) + b"\n")
    assert [row.state for row in sync(tmp_path / "spool")] == ["delivered"]
