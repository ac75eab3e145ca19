"""Several processes on one study: each trial has one of them at a time, and none is lost or done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState
from searching import postgres, search_with, states
from training_recipes import recipe_with

from cnn_tuning.config import SearchConfig, to_plain, validate
from cnn_tuning.search.question import question_of, study_name
from cnn_tuning.search.study import Lost, SharedStudy, is_gone, this_process

RECIPE = recipe_with([])
TAKE_ALL = """
import json, sys
from pathlib import Path
from cnn_tuning.config import SearchConfig, Recipe, validate
from cnn_tuning.search.study import SharedStudy, this_process
spec = json.loads(sys.argv[1])
search, recipe = validate(SearchConfig, spec["search"]), validate(Recipe, spec["recipe"])
sys.stdin.readline()  # all begin at once
study = SharedStudy(search, recipe, "s", Path(spec["folder"]), me=this_process(), patience_s=lambda: 30)
study.provide_trials()
while (taken := study.take()) is not None:
    study.report(taken[0], 0.5, 1)
    study.tell(taken[0].number, "COMPLETE", [0.5], {})
    print(taken[0].number, flush=True)
"""


def view(folder: Path, me: str = "other:1:1.0", **changes) -> SharedStudy:
    """Return a study as a process of that name sees it."""
    search = search_with(pruner={"name": "none"}, **changes)
    study = SharedStudy(search, RECIPE, "s", folder, me=me, patience_s=lambda: 0)
    study.provide_trials()
    return study


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(params=["journal", pytest.param("postgresql", marks=pytest.mark.slow)])
def storage(request):
    """Return each kind of storage."""
    if request.param == "journal":
        return "journal"
    server = request.getfixturevalue("database")
    name = f"d{time.monotonic_ns()}"
    server.psql(f"CREATE DATABASE {name};")
    return server.get_uri(name)


def test_processes_at_once_run_each_trial_of_the_budget_once(tmp_path, storage):
    search = search_with(budget={"trials": 24}, storage=storage)
    spec = {"search": to_plain(search), "recipe": to_plain(RECIPE), "folder": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE_ALL, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(int(line) for text in printed for line in text.split()) == list(range(24))
    trials = view(tmp_path, budget={"trials": 24}, storage=storage).study.trials
    assert states(trials) == ["COMPLETE"] * 24
    assert len({trial.params["optimizer.learning_rate"] for trial in trials}) > 20


def test_whoever_lost_a_trial_is_told_and_changes_nothing(tmp_path, storage):
    sleeper = view(tmp_path, "host:1:1.0", storage=storage)
    trial, chosen = sleeper.take()
    sleeper.report(trial, 0.1, 1)
    other = view(tmp_path, "host:2:1.0", storage=storage)
    assert other.take_away(trial.number, "host:1:1.0", "no sign of life", counts=True)
    again, same = other.take()
    assert (again.number, same) == (trial.number, chosen)
    with pytest.raises(Lost):
        sleeper.report(trial, 0.2, 2)
    with pytest.raises(Lost):
        sleeper.tell(trial.number, "FAIL", None, {"reason": "woke up"})
    sleeper.beat(trial.number, 1e6)
    sleeper.hand_back(trial.number)
    (held,) = [t for t in other.study.trials if t.state == TrialState.RUNNING]
    assert held.user_attrs == {"worker": "host:2:1.0", "retries": 1}
    other.tell(trial.number, "COMPLETE", [0.9], {"epochs": 2})
    with pytest.raises(Lost):
        sleeper.tell(trial.number, "COMPLETE", [0.1], {})
    assert other.study.trials[trial.number].value == 0.9


def test_a_trial_whose_workers_die_is_tried_again_so_many_times(tmp_path, storage):
    became = []
    for attempt in range(3):
        worker = view(tmp_path, f"host:{attempt}:1.0", retries=2, storage=storage)
        trial, _ = worker.take()
        assert trial.number == 0
        became.append(
            view(tmp_path, storage=storage, retries=2).take_away(0, worker.me, "its worker died", counts=True)
        )
    assert became == [
        ("lost", "its worker died: tried again (1 of 2)"),
        ("lost", "its worker died: tried again (2 of 2)"),
        ("failed", "its worker died, at each of 3 tries"),
    ]
    failed = worker.study.trials[0]
    assert (failed.state.name, failed.user_attrs["reason"]) == ("FAIL", "its worker died, at each of 3 tries")


def test_an_interruption_is_no_try(tmp_path, storage):
    for attempt in range(4):
        worker = view(tmp_path, f"host:{attempt}:1.0", retries=0, storage=storage)
        trial, _ = worker.take()
        assert trial.number == 0
        worker.hand_back(0)
    assert "retries" not in worker.study.trials[0].user_attrs


def test_a_repeated_answer_does_no_harm(tmp_path, storage):
    worker = view(tmp_path, "host:1:1.0", storage=storage)
    first, _ = worker.take()
    again, _ = worker.take()  # as if the answer to the first had been lost
    assert again.number == first.number
    for _ in range(2):
        assert not worker.report(again, 0.5, 1)
    for _ in range(2):
        worker.tell(again.number, "COMPLETE", [0.5], {"epochs": 1})
    assert states(worker.study.trials) == ["COMPLETE", "WAITING", "WAITING", "WAITING"]


def test_of_a_smaller_budget_no_more_is_run(tmp_path):
    assert len(view(tmp_path, budget={"trials": 9}).trials()) == 9
    smaller = view(tmp_path, budget={"trials": 1})
    assert smaller.take() is not None
    assert smaller.take() is not None  # the same again
    smaller.tell(0, "COMPLETE", [1.0], {})
    assert smaller.take() is None
    assert len(smaller.trials()) == 1


def test_a_changed_question_is_another_study_and_a_larger_budget_is_not():
    def name(recipe=RECIPE, data="d", code="c", price=0.0, **changes):
        search = search_with(**changes)
        return study_name(search, question_of(search, recipe, data, code, price))

    free = [
        {"budget": {"trials": 99, "minutes": 3.0}},
        {"workers": 2},
        {"storage": "postgresql://x@y/z"},
        {"grace_s": 5.0, "heartbeat_s": 1.0, "retries": 0},
        {"refit_seeds": 3, "importance": "fanova"},
    ]
    assert {name(**changes) for changes in free} == {name()}
    assert name(price=0.5) == name()
    # Where dollars decide which trial is best, those at another price are no part of the study.
    cheapest = {"objectives": [{"metric": "cost/usd", "direction": "minimize"}]}
    assert name(price=0.5, **cheapest) != name(price=0.4, **cheapest)
    # The epochs of the refit are no matter of the search where its settings say how many a trial has.
    settings = {"trainer.max_epochs": 1}
    longer = recipe_with(["trainer.max_epochs=9"])
    assert name(longer, settings=settings) == name(settings=settings)
    others = [
        name(longer),
        name(data="e"),
        name(code="d"),
        name(seeds=2),
        name(settings=settings),
        name(sampler={"name": "random"}),
        name(recipe_with(["seed=1"])),
    ]
    assert len({name(), *others}) == len(others) + 1


def test_half_a_line_at_the_journals_end_is_forgotten(tmp_path):
    study = view(tmp_path)
    study.take()
    before = states(study.study.trials)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"x","trial_id":0,"sta')  # what a kill or a full disk leaves
    other = view(tmp_path, "host:2:1.0")
    assert states(other.study.trials) == before
    assert other.take()[0].number == 1
    assert all(json.loads(line) for line in (tmp_path / "journal.log").read_text().splitlines())


@pytest.mark.parametrize("file", ["journal.flock", "study.lock"])
def test_a_killed_process_leaves_no_lock(tmp_path, file):
    view(tmp_path)
    lock = f"from filelock import FileLock; lock = FileLock({str(tmp_path / file)!r}); lock.acquire(timeout=0.1); "
    holder = subprocess.Popen(
        [sys.executable, "-c", lock + "print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "1\n"
    assert subprocess.run([sys.executable, "-c", lock], capture_output=True).returncode != 0
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert view(tmp_path, "host:2:1.0").take()[0].number == 0


def test_processes_are_told_apart(tmp_path):
    me = this_process()
    assert not is_gone(me)
    host, pid, began = me.rsplit(":", 2)
    assert is_gone(f"{host}:{pid}:{float(began) - 60:.2f}")  # the number is used again
    assert not is_gone(f"elsewhere{host}:1:1.0")  # nothing is known of another machine's
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    assert is_gone(f"{host}:{dead.pid}:{time.time():.2f}")


def test_a_search_is_checked_as_any_configuration():
    assert validate(SearchConfig, to_plain(search_with())) == search_with()
