"""Row 19: a sweep worker is SIGKILLed; its trial is tried again at most N times and never RUNNING for ever."""

from __future__ import annotations

import psutil
import pytest
from searching import Sweep, beside, running, search_with, states, status, tags, worker_of, workers

from cnn_tuning.tracking.deliver import sync

pytestmark = pytest.mark.slow


def kill_worker(sweep, tries):
    """Kill the worker of the first trial in mid-training, so many times; return what was killed."""
    killed = []

    def kill():
        for retries in range(tries):
            before = {trial.user_attrs["worker"] for trial in killed}
            # A trial is taken from a dead worker in two steps: it counts once another has it.
            (trial,) = sweep.until(
                lambda trials, retries=retries, before=before: [
                    t
                    for t in running(trials)
                    if t.user_attrs.get("retries", 0) == retries and t.user_attrs["worker"] not in before
                ]
            )[:1]
            sweep.until(lambda _, retries=retries: measured(sweep, 0) > retries)
            process = worker_of(trial)
            assert process.is_running()
            process.kill()
            killed.append(trial)

    return kill, killed


def measured(sweep, number):
    """Count a trial's runs that have a figure: they train."""
    own = [run for run in sweep.runs() if tags(run)["trial.number"] == str(number)]
    return sum(any(event["event"] == "metrics" for event in run) for run in own)


def test_19_its_trial_is_tried_again(tmp_path, digits_data):
    sweep = Sweep(tmp_path, digits_data, search_with(budget={"trials": 2}), ("trainer.max_epochs=6",))
    kill, killed = kill_worker(sweep, 1)
    with beside(kill):
        sweep.run()
    assert [trial.number for trial in killed] == [0]
    again, other = sweep.trials()
    assert states([again, other]) == ["COMPLETE", "COMPLETE"]
    assert again.user_attrs["retries"] == 1
    assert again.params == killed[0].params
    # The curve of the try before is as the repeated one's.
    assert again.intermediate_values.items() >= killed[0].intermediate_values.items()
    assert "retries" not in other.user_attrs
    first, second, _ = sweep.runs()
    assert (status(first), status(second)) == ("KILLED", "FINISHED")
    assert tags(first)["trial.state"] == "lost"
    assert tags(first)["trial.reason"] == "its worker was ended by SIGKILL: tried again (1 of 2)"
    assert tags(first)["trial.number"] == tags(second)["trial.number"] == "0"
    assert not workers()


def test_19_but_not_for_ever(tmp_path, digits_data, capfd, store_db, rows):
    search = search_with(budget={"trials": 2}, retries=1)
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=6",))
    kill, killed = kill_worker(sweep, 2)
    with beside(kill):
        sweep.run()
    assert len(killed) == 2
    failed, other = sweep.trials()
    assert states([failed, other]) == ["FAIL", "COMPLETE"]
    assert failed.user_attrs["reason"] == "its worker was ended by SIGKILL, at each of 2 tries"
    first, last = [run for run in sweep.runs() if tags(run)["trial.number"] == "0"]
    assert (status(first), tags(first)["trial.state"]) == ("KILLED", "lost")
    assert (status(last), tags(last)["trial.state"]) == ("FAILED", "failed")
    assert tags(last)["trial.reason"] == last[-1]["error"] == failed.user_attrs["reason"]
    figures = {k: v for event in last if event["event"] == "metrics" for k, v in event["values"].items()}
    assert figures["time/seconds"] > 0
    sync(sweep.spool, f"sqlite:///{store_db}")
    seen = "select status, t.value from runs join tags t using (run_uuid) where t.key = 'trial.reason' order by 1"
    assert rows(store_db, seen)[0] == ("FAILED", failed.user_attrs["reason"])
    told = capfd.readouterr().err
    assert "trial 0: its worker was ended by SIGKILL: tried again (1 of 1)" in told
    assert "trial 0 failed (its worker was ended by SIGKILL, at each of 2 tries)" in told


def test_19_and_the_sweep_itself(tmp_path, digits_data):
    """Everything of a sweep is killed at once; the next one finds it so without waiting."""
    search = search_with(budget={"trials": 1}, grace_s=10_000.0)
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=20",))
    process = sweep.start()
    (trial,) = sweep.until(running)
    victims = [psutil.Process(process.pid), worker_of(trial)]
    for victim in victims:
        victim.kill()
    process.communicate()
    assert states(sweep.trials()) == ["RUNNING"]
    sweep.run()
    assert states(sweep.trials()) == ["COMPLETE"]
