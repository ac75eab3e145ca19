"""What is drawn is a function of the seed, the trial's number and the history; pruners judge by epochs."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from searching import SPACE, found, search_with
from training_recipes import recipe_with

from cnn_tuning.config import patch
from cnn_tuning.search.samplers import Ranked, build_pruner, build_sampler, is_random
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
    ({"name": "tpe", "multivariate": False, "random_share": 0.34}, SPACE, 1),
    ({"name": "tpe", "random_share": 0.25}, NUMBERS, 1),
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
    sampler = name if isinstance(name, dict) else {"name": name}
    return search_with(
        space=space,
        objectives=targets,
        budget={"trials": trials},
        sampler={"startup_trials": 4} | sampler,
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


def drawn(folder, sampler, space=NUMBERS):
    """Return the values of each of 16 trials, of which the first is the experiment's own."""
    worked = play(folder, search_of({"name": "tpe", **sampler}, space, 1, 16))
    return [params for _, _, params, *_ in worked]


@pytest.mark.parametrize("multivariate", [True, False])
def test_a_share_of_the_trials_is_drawn_regardless_of_the_history(tmp_path, multivariate):
    """Other trials before them change what TPE draws, and not what is drawn at random."""
    shared = {"multivariate": multivariate, "random_share": 0.25}
    early, late = (drawn(tmp_path / str(n), {**shared, "startup_trials": n}) for n in (2, 6))
    same = {number for number, (a, b) in enumerate(zip(early, late, strict=True)) if a == b}
    assert {3, 7, 11, 15} <= same
    assert len({8, 9, 10, 12, 13, 14} & same) < 3
    plain = drawn(tmp_path / "plain", {"multivariate": multivariate})
    assert drawn(tmp_path / "none", {"multivariate": multivariate, "random_share": 0.0}) == plain != early


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.99), st.integers(1, 400))
def test_trials_drawn_at_random_are_evenly_spread(share, count):
    total = sum(is_random(number, share) for number in range(count))
    assert abs(total - share * count) <= 1 + 1e-6


def test_values_drawn_each_by_itself_do_not_depend_on_the_others(tmp_path):
    """The learning rate alone decides the result: what is drawn for it is the same in a larger space."""
    name = "optimizer.learning_rate"
    for multivariate in (False, True):
        sampler = {"multivariate": multivariate, "startup_trials": 4}
        small = drawn(tmp_path / f"small {multivariate}", sampler, {name: NUMBERS[name]})
        large = drawn(tmp_path / f"large {multivariate}", sampler)
        assert ([v[name] for v in small] == [v[name] for v in large]) is not multivariate


class Told(optuna.samplers.RandomSampler):
    """Draws at random, and notes which results it was told of."""

    def infer_relative_search_space(self, study, trial):
        self.results = [t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
        return {}


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_trials_that_were_given_up_are_ranked_below_complete_ones(direction):
    sign = 1 if direction == "maximize" else -1
    study = optuna.create_study(direction=direction)
    # The epoch at which each was given up (None: complete) and its value there, from the best to the worst.
    ended = [(None, 0.9), (None, 0.5), (None, 0.5), (3, 0.8), (1, 0.99), (1, 0.2), (1, math.nan)]
    for epoch, value in ended:
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        if epoch is not None:
            trial.report(sign * value, epoch)
        study.tell(trial, None if epoch else sign * value, state=TrialState.PRUNED if epoch else None)
    told = Told()
    Ranked(told).infer_relative_search_space(study, study.trials[-1])
    assert len(told.results) == len(ended) - 1  # but the trial itself
    study.ask()
    Ranked(told).infer_relative_search_space(study, study.trials[-1])
    assert told.results[1] == told.results[2]
    assert sorted(set(told.results), reverse=True) == [told.results[i] for i in (0, 1, 3, 4, 5, 6)]


@pytest.mark.slow
def test_a_gaussian_process_leaves_where_trials_are_given_up():
    """Only below 0.3 do trials end; what is given up above it says so by its only epoch."""
    search = search_of("gp", {"optimizer.learning_rate": {"kind": "float", "low": 0.0001, "high": 1.0}}, 1)
    study = optuna.create_study(direction="maximize", sampler=build_sampler(search, 0))
    for _ in range(18):
        trial = study.ask()
        rate = trial.suggest_float("optimizer.learning_rate", 0.0001, 1.0)
        if rate < 0.3:
            study.tell(trial, rate)
        else:
            trial.report(-rate, 1)
            study.tell(trial, state=TrialState.PRUNED)
    late = [t.params["optimizer.learning_rate"] for t in study.trials[-8:]]
    assert sum(rate < 0.4 for rate in late) >= 6


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
