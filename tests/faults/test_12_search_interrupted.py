"""Row 12: of a search; Ctrl-C, once and twice; a non-zero exit, one save, no trial is left RUNNING."""

from __future__ import annotations

import signal

import psutil
import pytest
from filelock import FileLock
from searching import Sweep, end_group, running, search_with, states, status, tags, worker_of

pytestmark = pytest.mark.slow
LONG = ("trainer.max_epochs=60", "trainer.checkpoint_every_s=1000.0")


def test_12_once(tmp_path, digits_data):
    sweep = Sweep(tmp_path, digits_data, search_with(budget={"trials": 2}), LONG)
    process = sweep.start()
    (trial,) = running(sweep.until(running))
    worker = worker_of(trial)
    end_group(process)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopping; workers save what they have trained" in printed
    assert not worker.is_running()
    assert states(sweep.trials()) == ["WAITING", "WAITING"]
    assert sweep.trials()[0].params == trial.params
    assert len(list((tmp_path / "search" / "trials").rglob("*.ckpt"))) == 1  # one save
    (run,) = sweep.runs()
    assert (status(run), tags(run)["trial.state"]) == ("KILLED", "interrupted")


def test_12_twice(tmp_path, digits_data):
    sweep = Sweep(tmp_path, digits_data, search_with(budget={"trials": 2}), LONG)
    process = sweep.start()
    (trial,) = running(sweep.until(running))
    worker = worker_of(trial)
    with FileLock(tmp_path / "search" / "study.lock"):  # it cannot let its trial go
        end_group(process)
        while not process.stdout.readline().startswith("search: stopping"):  # its own word, not a worker's
            pass
        assert worker.is_running()
        end_group(process)
        worker.wait(60)
    printed, _ = process.communicate(timeout=100)
    assert "the workers are ended" in printed
    assert process.returncode == 128 + signal.SIGINT
    (run,) = sweep.runs()  # ended by the search itself, as its worker no longer could
    assert (status(run), tags(run)["trial.state"]) == ("KILLED", "interrupted")
    assert states(sweep.trials()) == ["WAITING", "WAITING"]
    assert "retries" not in sweep.trials()[0].user_attrs


def test_12_before_the_first_trial(tmp_path, digits_data):
    sweep = Sweep(tmp_path, digits_data, search_with(budget={"trials": 2}), LONG)
    process = sweep.start()
    sweep.until(lambda trials: len(trials) == 2 and psutil.Process(process.pid).children())
    end_group(process)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT
    assert states(sweep.trials()) == ["WAITING", "WAITING"]
