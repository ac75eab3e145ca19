"""Row 7: PostgreSQL restarts during a sweep; it recovers without a lost trial, or a clear error is told."""

from __future__ import annotations

import subprocess

import psycopg
import pytest
from searching import Sweep, beside, postgres, running, search_with, states

from cnn_tuning.errors import UserError
from cnn_tuning.search import sweep as sweeping

pytestmark = pytest.mark.slow


def stop(server, mode: str = "fast") -> None:
    control(server, "stop", "-m", mode)


def start(server) -> None:
    folder = server.get_uri().partition("host=")[2]
    control(server, "-o", f'-h "" -k {folder}', "start")


@pytest.fixture
def server(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server
        stop(server)  # by its folder: it is no longer the process that was started at first


def control(server, *action: str) -> None:
    """Start or stop the server as its administrator does."""
    command = [str(server.bin_path / "pg_ctl"), "-w", "-D", str(server.pgdata), "-l", str(server.log), *action]
    done = subprocess.run(command, user=server.system_user, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", [pytest.param("fast", marks=pytest.mark.long), "immediate"])
def test_07_it_recovers(tmp_path, digits_data, server, mode, capfd):
    search = search_with(budget={"trials": 4}, storage=server.get_uri(), workers=2)
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=12",))
    seen = []

    def restart():
        under_way = running(sweep.until(lambda trials: len(running(trials)) == 2))
        stop(server, mode)
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.get_uri())
        seen.extend(under_way)
        start(server)

    with beside(restart):
        sweep.run()
    assert len(seen) == 2
    trials = sweep.trials()
    assert states(trials) == ["COMPLETE"] * 4
    for trial in trials:
        assert sorted(trial.intermediate_values) == list(range(1, 13))
        assert "reason" not in trial.user_attrs
    # Those that were under way went on, whoever had them.
    assert all(trials[trial.number].params == trial.params for trial in seen)
    assert sorted(tags["trial.number"] for tags in map(_tags, sweep.runs())) == ["0", "1", "2", "3"]


def test_07_a_clear_error_where_it_stays_away(tmp_path, digits_data, server, monkeypatch):
    monkeypatch.setattr(sweeping, "PATIENCE_S", 3.0)
    search = search_with(budget={"trials": 2}, storage=server.get_uri())
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=25",))

    def stop_it():
        sweep.until(running)
        stop(server)

    with (
        pytest.raises(UserError, match=r"search.storage postgresql://.* does not answer") as told,
        beside(stop_it),
    ):
        sweep.run()
    assert "\n" not in str(told.value)
    assert "start it or mend the address; the same command goes on" in str(told.value)
    with pytest.raises(UserError, match="does not answer"):  # at once, when it is started again too early
        sweep.run()
    start(server)
    sweep.run()
    assert states(sweep.trials()) == ["COMPLETE", "COMPLETE"]


def _tags(run):
    return next(event["tags"] for event in run if event["event"] == "start")
