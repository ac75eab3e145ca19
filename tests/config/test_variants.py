"""Variants of a recipe: arms of ablations and points of searches, checked when the configuration is composed."""

# ruff: noqa: E501
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.config import (
    arms,
    changes_of,
    compose,
    grid,
    lock_text,
    patch,
    recipe_of,
    side_by_side,
    to_plain,
    validate,
)
from cnn_tuning.config.schema import Config, QuestionConfig, SearchConfig
from cnn_tuning.errors import UserError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def composed(*overrides: str) -> Config:
    return compose(overrides, params=None, conf=CONF)


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(composed("experiment=digits"))


@pytest.mark.parametrize("option", sorted(p.stem for p in (CONF / "ablation").glob("*.yaml")))
@pytest.mark.parametrize("experiment", ["digits", "lab"])
def test_every_shipped_ablation_gives_arms(option, experiment):
    config = composed(f"experiment={experiment}", f"ablation={option}")
    for question in config.ablation.questions.values():
        found = arms(recipe_of(config), question)
        assert len(found) >= 2
        assert next(iter(found)) == question.reference
        assert len({lock(arm) for arm in found.values()}) == len(found)


def lock(recipe) -> str:
    return json.dumps(to_plain(recipe), sort_keys=True)


@pytest.mark.parametrize("option", sorted(p.stem for p in (CONF / "search").glob("*.yaml")))
def test_every_shipped_search_composes(option):
    assert composed("experiment=lab", f"search={option}").search.name == option


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_what_an_experiment_changes_in_an_ablation_counts_only_where_it_is_chosen(experiment):
    assert composed(f"experiment={experiment}", "ablation=none").ablation.questions == {}
    other = composed(f"experiment={experiment}", "ablation=schedule").ablation.questions
    assert list(other) == ["schedule"]


def test_several_ablations_are_chosen_together():
    config = composed("experiment=digits", "ablation=[dropout,schedule]")
    assert list(config.ablation.questions) == ["dropout", "schedule"]
    schedules = config.ablation.questions["schedule"].factors["schedule"]
    assert schedules["cosine"]["final_fraction"] == 0.0  # the option of conf/schedule, resolved


def test_arms_differ_from_the_recipe_in_their_factors_only(recipe):
    question = QuestionConfig("?", {"model.dropout": ["none", "both"], "trainer.batch_size": [32, 64]})
    found = arms(recipe, question)
    assert list(found) == [
        "dropout=none, batch_size=32", "dropout=none, batch_size=64",
        "dropout=both, batch_size=32", "dropout=both, batch_size=64",
    ]  # fmt: skip
    last = found["dropout=both, batch_size=64"]
    assert (last.model.dropout, last.trainer.batch_size) == ("both", 64)
    assert last.optimizer == recipe.optimizer


@given(
    sizes=st.lists(st.integers(1, 2000), min_size=2, max_size=5, unique=True),
    epochs=st.integers(1, 50),
    equal=st.sampled_from(["updates", "both"]),
)
def test_equal_updates_scale_the_epochs_with_the_batch(recipe, sizes, epochs, equal):
    question = QuestionConfig("?", {"trainer.batch_size": sizes}, {"trainer.max_epochs": epochs}, equal=equal)
    found = arms(recipe, question)
    for label, arm in found.items():
        wanted = max(1, round(epochs * arm.trainer.batch_size / sizes[0]))
        if equal == "updates" or label.endswith("equal updates"):
            assert arm.trainer.max_epochs == wanted
        else:
            assert arm.trainer.max_epochs == epochs
    if equal == "both":  # no arm stands twice
        assert len({(a.trainer.batch_size, a.trainer.max_epochs) for a in found.values()}) == len(found)


def test_the_order_of_levels_and_the_reference_survive_the_lock_file():
    config = composed("experiment=digits", "ablation=[augmentation,learning_rate]")
    again = validate(Config, yaml.safe_load(lock_text(config)))
    assert again == config
    assert again.ablation.questions["augmentation"].reference == "augment=none"
    assert list(again.ablation.questions["augmentation"].factors["augment"]) == ["none", "shift", "affine"]


MISTAKES = {
    "ablation=[dropot]": "no option 'dropot'; did you mean 'dropout'?",
    "ablation.questions.mine={question: q, factors: {model.dropot: [none, both]}}": "unknown name; did you mean 'dropout'",
    "ablation.questions.mine={question: q, factors: {model.dropout: [none]}}": "one arm only",
    "ablation.questions.mine={question: q, factors: {model.dropout: [none, all]}}": "must be 'none', 'conv', 'dense' or 'both'",
    "ablation.questions.mine={question: q, factors: {model.dropout: [none, both]}, reference: x}": "must be one of",
    "ablation.questions.mine={question: q, factors: {model.dropout: [none, both]}, settings: {trainer.epochs: 1}}": "settings: trainer.epochs: unknown name",
    "search.space={optimizer.learning_rat: {kind: float, low: 1e-4, high: 1e-2}}": "unknown name; did you mean 'learning_rate'",
    "search.space={optimizer.learning_rate: {kind: float, low: 1e-2, high: 1e-4}}": "low: got 0.01, must be below high",
    "search.space={optimizer.learning_rate: {kind: float, low: 0.0, high: 1e-2, log: true}}": "must be above 0",
    "search.space={trainer.batch_size: {kind: int, low: 0, high: 64}}": "trainer.batch_size: got 0",
    "search.space={model.dropout: {kind: categorical, choices: [none, all]}}": "must be 'none', 'conv', 'dense' or 'both'",
    "search.space={optimizer.momentum: {kind: float, low: 0.1, high: 0.9}}": "unknown name",
    "search.space={model.dense_dropout: {kind: float, low: 0.1, high: 0.9, when: {model.dropout: both}}}": "no dimension before it",
    "search.space={data.image.size: {kind: categorical, choices: [[8, 8], [16, 16]]}}": "search.space.data.image.size: data are prepared before anything is trained: they cannot vary",
    "search.space={data.val_samples: {kind: int, low: 10, high: 20}}": "search.space.data.val_samples: data are prepared before",
    "search.space={evaluation.confidence: {kind: float, low: 0.8, high: 0.9}}": "search.space.evaluation.confidence: cannot vary, only seed, augment, model",
    "ablation.questions.mine={question: q, factors: {data.name: [digits, mnist]}}": "factors: data.name: data are prepared before",
    "search={space: {trainer.batch_size: {kind: categorical, choices: [32, 64]}}, sampler: {name: cmaes}}": "search.sampler.name: 'cmaes' draws ranges without `when`, of which there is none; use 'tpe'",
    "ablation.questions.mine={question: q, factors: {trainer.max_epochs: [2, 8], trainer.batch_size: [32, 128]}, equal: updates}": "mine.equal: got 'updates', must be 'epochs' where trainer.max_epochs is a factor",
    "search.space={optimizer: {kind: categorical, choices: [sgd, adam]}, optimizer.momentum: {kind: float, low: 0.5, high: 0.9}}": "optimizer.momentum: unknown name; one of betas, epsilon, learning_rate, name, weight_decay (with optimizer=adam",
    "search.space={optimizer: {kind: categorical, choices: [sgd, adam]}, optimizer.momentum: {kind: float, low: 0.5, high: 0.9, when: {optimizer: [sgd, adam]}}}": "(with optimizer=adam; `when` can leave that out)",
    "search.space={optimizer.momentum: {kind: float, low: 0.5, high: 0.9}, optimizer: {kind: categorical, choices: [sgd, adam]}}": "(with optimizer=adam",
    "search.space={model.dropout: {kind: categorical, choices: [none, both]}, optimizer: {kind: categorical, choices: [sgd, adam], when: {model.dropout: both}}, optimizer.momentum: {kind: float, low: 0.5, high: 0.9, when: {model.dropout: both}}}": "(with optimizer=adam",
}  # fmt: skip


@pytest.mark.parametrize(("override", "told"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_is_told_before_anything_is_read(override, told):
    with pytest.raises(UserError) as caught:
        composed("experiment=digits", "search=none", override)
    assert told in str(caught.value)


def test_mistakes_that_need_the_whole_search_are_told_together():
    space = "search.space={model.dropout: {kind: categorical, choices: [none, both]}}"
    two = (
        "search.objectives=[{metric: val/accuracy, direction: maximize}, {metric: val/loss, direction: minimize}]"
    )
    more = ["search.pruner.name=median", "search.storage=mysql://x", "search.budget.dollars=1"]
    with pytest.raises(UserError) as caught:
        composed("experiment=digits", "search=none", space, two, *more)
    for part in (
        "must be 'none' with several objectives",
        "storage: got 'mysql://x'",
        "needs tracking.price_per_hour",
    ):
        assert part in str(caught.value)


def test_a_whole_section_and_what_depends_on_it_can_be_searched(recipe):
    config = composed(
        "experiment=digits",
        "search=none",
        "search.space={optimizer: {kind: categorical, choices: [adam, sgd]}, "
        "optimizer.momentum: {kind: float, low: 0.5, high: 0.9, step: 0.2, when: {optimizer: sgd}}}",
        "search.sampler.name=grid",
    )
    points = list(grid(config.search))
    assert points == [
        {"optimizer": "adam"},
        *({"optimizer": "sgd", "optimizer.momentum": pytest.approx(m)} for m in (0.5, 0.7, 0.9)),
    ]
    assert changes_of(config.search, points[0])["optimizer"]["name"] == "adam"


@pytest.mark.parametrize(
    "momentum",
    [
        "when: {optimizer: sgd}",
        # Only where the optimizer is chosen, and only sgd is.
        "when: {model.dropout: both}",
    ],
)
def test_what_no_trial_can_combine_is_no_mistake(momentum):
    optimizers = "[sgd, adam]" if "optimizer" in momentum else "[sgd], when: {model.dropout: both}"
    space = (
        "{model.dropout: {kind: categorical, choices: [none, both]}, "
        f"optimizer: {{kind: categorical, choices: {optimizers}}}, "
        f"optimizer.momentum: {{kind: float, low: 0.5, high: 0.9, {momentum}}}}}"
    )
    assert list(composed("experiment=digits", "search=none", f"search.space={space}").search.space)


def test_workers_share_the_disk_of_a_stream(recipe):
    streamed = patch(recipe, {"trainer.stream": "s3://bucket/set", "trainer.stream_cache_gb": 20.0})
    assert side_by_side(streamed, 4).trainer.stream_cache_gb == 5.0
    assert side_by_side(patch(streamed, {"trainer.threads": 2}), 4).trainer.stream_cache_gb == 5.0
    assert side_by_side(streamed, 1) == streamed
    assert side_by_side(recipe, 4).trainer == dataclasses.replace(
        recipe.trainer, threads=side_by_side(recipe, 4).trainer.threads
    )


@given(data=st.data())
def test_a_grid_visits_each_point_once(data):
    low = data.draw(st.integers(-5, 5))
    steps = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(2, 6))
    labels = data.draw(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True))
    space = {
        "a": {"kind": "int", "low": low, "high": low + steps * count, "step": steps},
        "b": {"kind": "categorical", "choices": labels},
    }
    points = [tuple(p.values()) for p in grid(validate(SearchConfig, {"name": "x", "space": space}))]
    assert points == [(low + steps * i, label) for i in range(count + 1) for label in labels]
