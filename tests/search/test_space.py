"""From a space in YAML to values and recipes."""

from __future__ import annotations

import itertools

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import SPACE, search_with
from training_recipes import CONF, recipe_with

from cnn_tuning.config import compose, patch
from cnn_tuning.config.variants import recipe_of
from cnn_tuning.search.space import first_values, most_epochs, own_values, suggest, trial_recipe

RECIPE = recipe_with([])
SECTIONS = {
    "optimizer": {
        "kind": "categorical",
        "choices": {
            "sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
            "adam": {"name": "adam", "learning_rate": 1e-3},
        },
    },
    "optimizer.momentum": {"kind": "float", "low": 0.0, "high": 0.9, "when": {"optimizer": "sgd"}},
    "trainer.batch_size": {"kind": "categorical", "choices": [32, 64]},
}


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_values_lie_in_the_space_and_make_a_recipe(seed):
    search = search_with(space={**SPACE, **SECTIONS, "trainer.max_epochs": {"kind": "int", "low": 1, "high": 6}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    chosen = suggest(study.ask(), search)
    recipe = trial_recipe(search, RECIPE, chosen)
    assert ("optimizer.momentum" in chosen) == (recipe.optimizer.name == "sgd")
    assert ("model.dense_dropout" in chosen) == (recipe.model.dropout == "both")
    # A whole section first, values inside it after it.
    assert recipe.optimizer.learning_rate == chosen["optimizer.learning_rate"]
    assert 1e-4 <= recipe.optimizer.learning_rate <= 1e-1
    assert recipe.trainer.batch_size == int(chosen["trainer.batch_size"])
    assert recipe.trainer.max_epochs in range(1, 7)


def test_settings_hold_for_all_trials_and_give_way_to_what_is_searched():
    search = search_with(settings={"trainer.max_epochs": 5, "optimizer.learning_rate": 0.5})
    recipe = trial_recipe(search, RECIPE, {"optimizer.learning_rate": 0.02})
    assert (recipe.trainer.max_epochs, recipe.optimizer.learning_rate) == (5, 0.02)


def test_own_values_are_left_out_where_they_lie_outside():
    assert own_values(search_with(), RECIPE) == {"optimizer.learning_rate": 0.01, "model.dropout": "none"}
    outside = recipe_with(["optimizer.learning_rate=0.5", "model.dropout=conv"])
    assert own_values(search_with(), outside) == {}
    dropped = recipe_with(["model.dropout=both", "model.dense_dropout=0.2"])
    assert own_values(search_with(), dropped)["model.dense_dropout"] == 0.2


def test_own_values_of_sections_and_steps():
    stepped = {"trainer.label_smoothing": {"kind": "float", "low": 0.0, "high": 0.2, "step": 0.1}}
    search = search_with(space={**SECTIONS, **stepped})
    recipe = recipe_with(["trainer.label_smoothing=0.1"])
    assert own_values(search, recipe) == {"trainer.batch_size": "64", "trainer.label_smoothing": 0.1}
    sgd = patch(recipe, {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}})
    assert own_values(search, sgd)["optimizer"] == "sgd"
    assert own_values(search, sgd)["optimizer.momentum"] == 0.9
    assert "trainer.label_smoothing" not in own_values(search, recipe_with(["trainer.label_smoothing=0.15"]))


def test_own_values_of_a_section_whose_inner_value_is_searched_too():
    rate = {"optimizer.learning_rate": {"kind": "float", "low": 1e-3, "high": 1.0, "log": True}}
    search = search_with(space={**SECTIONS, **rate})
    sgd = patch(RECIPE, {"optimizer": {"name": "sgd", "learning_rate": 0.02, "momentum": 0.5}})
    own = own_values(search, sgd)
    assert (own["optimizer"], own["optimizer.momentum"], own["optimizer.learning_rate"]) == ("sgd", 0.5, 0.02)
    decayed = patch(sgd, {"optimizer.weight_decay": 0.1})
    assert "optimizer" not in own_values(search, decayed)


def test_a_grid_is_every_point_once_and_no_more_than_the_budget():
    space = {
        "optimizer": SECTIONS["optimizer"],
        "optimizer.momentum": {"kind": "categorical", "choices": [0.0, 0.9], "when": {"optimizer": "sgd"}},
        "trainer.batch_size": SECTIONS["trainer.batch_size"],
    }
    search = search_with(space=space, sampler={"name": "grid"}, budget={"trials": 100})
    points, left_out = first_values(search, RECIPE)
    wanted = [("sgd", "0"), ("sgd", "0.9"), ("adam", None)]
    found = [(p["optimizer"], p.get("optimizer.momentum"), p["trainer.batch_size"]) for p in points]
    assert sorted(found, key=str) == sorted(((*a, b) for a, b in itertools.product(wanted, ["32", "64"])), key=str)
    assert left_out == 0
    few, left_out = first_values(search_with(space=space, sampler={"name": "grid"}), RECIPE)
    assert (few, left_out) == (points[:4], 2)


def test_the_longest_trial():
    assert most_epochs(search_with(), RECIPE) == 2
    assert most_epochs(search_with(settings={"trainer.max_epochs": 4}), RECIPE) == 4
    for dimension in ({"kind": "int", "low": 1, "high": 6}, {"kind": "categorical", "choices": [2, 6, 4]}):
        assert most_epochs(search_with(space={"trainer.max_epochs": dimension}), RECIPE) == 6


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "search").glob("*.yaml")))
def test_every_search_that_is_shipped_composes_and_its_first_trial_has_a_recipe(option):
    config = compose(["experiment=lab", "ablation=none", f"search={option}"], params=None, conf=CONF)
    assert config.search.name == option
    if option != "none":
        study = optuna.create_study(
            directions=[objective.direction for objective in config.search.objectives],
            sampler=optuna.samplers.RandomSampler(0),
        )
        for _ in range(5):
            trial_recipe(config.search, recipe_of(config), suggest(study.ask(), config.search))
