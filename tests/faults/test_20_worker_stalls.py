"""Row 20: a sweep worker stalls past its grace (SIGSTOP); the sweep goes on without it."""

from __future__ import annotations

import signal

import psutil
import pytest
from filelock import FileLock, Timeout
from searching import Sweep, beside, running, search_with, states, status, tags, worker_of, workers

pytestmark = pytest.mark.slow


def test_20_it_is_replaced(tmp_path, digits_data, capfd):
    search = search_with(budget={"trials": 2}, heartbeat_s=0.3, grace_s=4.0)
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=6",))
    stalled = []

    def stall():
        (trial,) = running(sweep.until(running))
        process = worker_of(trial)
        process.send_signal(signal.SIGSTOP)
        while process.status() != psutil.STATUS_STOPPED:
            pass
        stalled.append((trial, process))

    with beside(stall):
        sweep.run()
    ((trial, process),) = stalled
    again, other = sweep.trials()
    assert states([again, other]) == ["COMPLETE", "COMPLETE"]
    assert (again.number, again.params) == (trial.number, trial.params)
    assert again.user_attrs["retries"] == 1
    assert again.user_attrs["worker"] != trial.user_attrs["worker"]
    assert not process.is_running()
    why = "its worker gave no sign of life for 4 s: tried again (1 of 2)"
    assert f"trial 0: {why}" in capfd.readouterr().err
    stopped = sweep.runs()[0]
    assert status(stopped) == "KILLED"
    assert (tags(stopped)["trial.state"], tags(stopped)["trial.reason"]) == ("lost", why)


def test_20_it_held_the_journal(tmp_path, digits_data):
    """The worker is stopped while it has the lock without which no other can write."""
    search = search_with(budget={"trials": 1}, heartbeat_s=0.3, grace_s=4.0)
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=6",))
    held = []

    def stall():
        (trial,) = running(sweep.until(running))
        process = worker_of(trial)
        while not held:
            process.suspend()
            while process.status() != psutil.STATUS_STOPPED:
                pass
            try:
                # Another process holds it for far less.
                with FileLock(tmp_path / "search" / "journal.flock", timeout=0.5):
                    pass
            except Timeout:
                held.append(process)
                return
            process.resume()
            assert process.is_running()

    with beside(stall):
        sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "COMPLETE"
    assert trial.user_attrs["retries"] == 1


def test_20_one_that_is_stopped_before_it_took_a_trial(tmp_path, digits_data):
    """The other worker does all the work, and the stopped one does not keep the sweep from its end."""
    search = search_with(budget={"trials": 3}, workers=2, heartbeat_s=0.3, grace_s=4.0)
    sweep = Sweep(tmp_path, digits_data, search)
    stopped = []

    def stop():
        sweep.until(lambda trials: len(workers()) == 2)
        process = workers()[1]
        process.send_signal(signal.SIGSTOP)
        stopped.append(process)

    with beside(stop):
        sweep.run()
    assert states(sweep.trials()) == ["COMPLETE"] * 3
    assert not stopped[0].is_running()
    assert not any("retries" in trial.user_attrs for trial in sweep.trials())  # it had taken none
