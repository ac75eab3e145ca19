"""What is drawn is a function of the seed, the trial's number and the history; pruners judge by epochs."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from searching import SPACE, found, search_with
from training_recipes import recipe_with

from cnn_tuning.config import patch
from cnn_tuning.search.samplers import build_pruner
from cnn_tuning.search.study import SharedStudy

NUMBERS = {
    "optimizer.learning_rate": SPACE["optimizer.learning_rate"],
    "trainer.label_smoothing": {"kind": "float", "low": 0.0, "high": 0.5},
    "trainer.batch_size": {"kind": "int", "low": 16, "high": 128, "log": True},
}
SAMPLERS = [
    ("tpe", SPACE, 1),
    ("tpe", NUMBERS, 1),
    ("tpe", SPACE, 2),
    ("random", SPACE, 1),
    ("cmaes", NUMBERS, 1),
    ("cmaes", SPACE, 1),
    pytest.param("gp", NUMBERS, 1, marks=pytest.mark.slow),
]
RECIPE = recipe_with([])
TIME = {"metric": "time/train_seconds", "direction": "minimize"}


def play(folder: Path, search, *, stops=(), seed=0, most=99):
    """Work through a study with made-up results, beginning anew in mid-trial where it stops."""
    recipe = patch(RECIPE, {"seed": seed})
    waiting = list(stops)
    names = iter(f"host:{n}:1.0" for n in range(100))

    def open_study():
        study = SharedStudy(search, recipe, "s", folder, me=next(names), patience_s=lambda: 0)
        study.provide_trials()
        return study

    study = open_study()
    while most and (taken := study.take()) is not None:
        most -= 1
        trial, chosen = taken
        # Ties are common among accuracies; they must not be broken by the order in which trials ended.
        value = round(-((math.log10(chosen["optimizer.learning_rate"]) + 2) ** 2), 1)
        values = [value, chosen["optimizer.learning_rate"]][: len(search.objectives)]
        if len(values) == 1:
            study.report(trial, value, 1)
        if trial.number in waiting:
            waiting.remove(trial.number)
            study.hand_back(trial.number)
            study = open_study()
            continue
        study.tell(trial.number, "COMPLETE", values, {})
    return found(study.trials())


def search_of(name, space, objectives, trials=14):
    targets = [{"metric": "val/accuracy", "direction": "maximize"}, TIME][:objectives]
    return search_with(
        space=space,
        objectives=targets,
        budget={"trials": trials},
        sampler={"name": name, "startup_trials": 4},
        pruner={"name": "none"},
    )


@pytest.mark.parametrize(("name", "space", "objectives"), SAMPLERS)
def test_a_study_that_was_stopped_goes_on_with_the_same_values(tmp_path, name, space, objectives):
    search = search_of(name, space, objectives)
    whole = play(tmp_path / "whole", search)
    assert play(tmp_path / "stopped", search, stops=[2, 6, 7, 11]) == whole
    drawn = [params["optimizer.learning_rate"] for _, _, params, *_ in whole]
    assert len(set(drawn)) == len(whole)  # no draw is repeated
    assert play(tmp_path / "other", search, seed=1) != whole


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_larger_budget_goes_on_as_if_asked_for_at_first(tmp_path, name):
    whole = play(tmp_path / "whole", search_of(name, SPACE, 1, trials=12))
    play(tmp_path / "grown", search_of(name, SPACE, 1, trials=7))
    assert play(tmp_path / "grown", search_of(name, SPACE, 1, trials=12)) == whole


@pytest.mark.parametrize("name", ["tpe", "cmaes", pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_learn_from_the_history(tmp_path, name):
    trials = play(tmp_path, search_of(name, NUMBERS, 1, trials=24))
    early = sum(values[0] for *_, values in trials[1:9])
    late = sum(values[0] for *_, values in trials[-8:])
    assert late > early


def curves(pruner, lines, epochs=9):
    """Return after which epoch each trial is given up, None where it is complete; one line of values a trial."""
    search = search_with(pruner=pruner, settings={"trainer.max_epochs": epochs})
    study = optuna.create_study(
        direction="maximize",
        study_name="curves",
        pruner=build_pruner(search, epochs),
        sampler=optuna.samplers.RandomSampler(0),
    )
    ended = []
    for line in lines:
        trial, given_up = study.ask(), None
        for epoch, value in enumerate(line, start=1):
            trial.report(value, epoch)
            if trial.should_prune():
                given_up = epoch
                break
        ended.append(given_up)
        study.tell(trial, None if given_up else line[-1], state=optuna.trial.TrialState(2 if given_up else 1))
    return ended


FALLING = [[value + epoch / 100 for epoch in range(9)] for value in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]


def test_pruners_wait_for_their_epochs_and_trials():
    for name in ("median", "asha", "hyperband"):
        assert curves({"name": name, "startup_trials": 6}, FALLING) == [None] * 6
        ended = curves({"name": name, "startup_trials": 2, "warmup_epochs": 3}, FALLING)
        assert ended[:2] == [None, None]
        assert any(ended)
        assert all(epoch is None or epoch >= 3 for epoch in ended)
    assert curves({"name": "median", "startup_trials": 1, "warmup_epochs": 1}, FALLING) == [None, 1, 1, 1, 1, 1]
    assert curves({"name": "none"}, FALLING) == [None] * 6
