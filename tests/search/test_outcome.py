"""What a search found, from studies whose truth is known: tables, importances, plots and the page."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from project import ROOT

from cnn_tuning.config import (
    BudgetConfig,
    Choice,
    FloatRange,
    IntRange,
    ObjectiveConfig,
    PrunerConfig,
    Recipe,
    SearchConfig,
    compose,
    patch,
    select,
)
from cnn_tuning.reports.scales import dimension_scale, metric_scale, short_names
from cnn_tuning.search.outcome import SearchOutcome, write_outcome
from cnn_tuning.search.space import Chosen, own_values, suggest

RATE = FloatRange("float", 1e-4, 1e-1, log=True)
DROPOUT = FloatRange("float", 0.0, 0.6)
SPACE = {
    "optimizer.learning_rate": RATE,
    "model.dense_dropout": DROPOUT,
    "trainer.batch_size": Choice("categorical", [32, 64, 128]),
    "optimizer": Choice(
        "categorical",
        {
            "adamw": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.01},
            "sgd": {"name": "sgd", "learning_rate": 0.01},
        },
    ),
    "optimizer.momentum": FloatRange("float", 0.5, 0.99, when={"optimizer": "sgd"}),
}
TABLES = {"trials.csv", "best.json", "importances.json", "metrics.json", "report.html"}
PLOTS = {"history.png", "parallel.png", "importance.png", "slice.png", "contour.png", "intermediate.png"}
COST = ObjectiveConfig("cost/usd", "minimize")
EPOCHS = 4

# Values of a trial come in; its curve, or the reason of its failure, goes out.
World = Callable[[Chosen, random.Random], list[float] | str]


def searching(space: dict[str, Any] = SPACE, **more: Any) -> SearchConfig:
    return SearchConfig("small", space, BudgetConfig(60), {"trainer.max_epochs": EPOCHS}, **more)


def rate_matters(chosen: Chosen, noise: random.Random) -> list[float]:
    """Only the learning rate matters: best at 0.003."""
    distance = math.log10(chosen["optimizer.learning_rate"] / 0.003) ** 2
    error = min(0.9, 0.02 * 10**distance * math.exp(noise.gauss(0, 0.02)))
    return [1 - min(0.9, error * (1 + 2 / epoch)) for epoch in range(1, EPOCHS + 1)]


def searched(
    search: SearchConfig, world: World = rate_matters, *, trials: int = 30, first: Chosen | None = None
) -> optuna.Study:
    """Return a study of random values whose trials end as the world says, pruned below 60 % after two epochs."""
    study = optuna.create_study(
        directions=[o.direction for o in search.objectives], sampler=optuna.samplers.RandomSampler(seed=3)
    )
    noise = random.Random(3)
    study.enqueue_trial(first or {})
    for number in range(trials):
        trial = study.ask()
        curve = world(suggest(trial, search), noise)
        trial.set_user_attr("seconds", 2.5)
        trial.set_user_attr("epochs", EPOCHS)
        if isinstance(curve, str):
            trial.set_user_attr("reason", curve)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif len(search.objectives) > 1:
            study.tell(trial, [curve[-1], noise.choice([0.01, 0.02, 0.03]) * (1 + number % 3)])
        else:
            pruned = curve[1] < 0.6
            for epoch, value in enumerate(curve[: 2 if pruned else None], start=1):
                trial.report(value, epoch)
            state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
            study.tell(trial, None if pruned else max(curve), state=state)
    return study


def outcome_of(folder: Path, search: SearchConfig, recipe: Recipe, study: optuna.Study) -> SearchOutcome:
    """Write the outcome; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return write_outcome(folder, study, search, recipe)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def usual(tmp_path_factory, own_recipe) -> tuple[Path, SearchOutcome, optuna.Study]:
    """A search of 30 trials that began with the experiment's own values."""
    folder, search = tmp_path_factory.mktemp("usual"), searching()
    study = searched(search, first=own_values(search, own_recipe))
    return folder, outcome_of(folder, search, own_recipe, study), study


@pytest.fixture(scope="module")
def own_recipe() -> Recipe:
    """The recipe of the digits experiment with values inside the space."""
    recipe = select(Recipe, compose(["experiment=digits"], params=None, conf=ROOT / "conf"))
    return patch(recipe, {"trainer.batch_size": 64, "optimizer": SPACE["optimizer"].choices["adamw"]})


def test_trials_made_without_a_price_cost_what_they_would_now(tmp_path, own_recipe):
    search = searching(workers=2)
    study = searched(search, trials=3)
    outcome = write_outcome(tmp_path, study, search, own_recipe, 3600.0)
    assert outcome.usd == pytest.approx(3 * 2.5 / 2)
    assert [float(row["usd"]) for row in lines(tmp_path)] == [1.25] * 3


def test_dollars_per_point_are_those_above_the_own_values(tmp_path, own_recipe):
    search = searching({"model.dense_dropout": DROPOUT})
    own = own_values(search, own_recipe)["model.dense_dropout"]
    study = optuna.create_study(direction="maximize")
    for accuracy, usd in ((0.90, 2.0), (0.92, 3.0), (0.90, 3.0), (0.91, 1.5), (None, 0.5)):
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if accuracy else optuna.trial.TrialState.PRUNED,
            value=accuracy,
            params={"model.dense_dropout": 0.3 if study.trials else own},
            distributions={"model.dense_dropout": optuna.distributions.FloatDistribution(0.0, 0.6)},
            user_attrs={"seconds": 1.0, "usd": usd},
        )
        study.add_trial(trial)
    write_outcome(tmp_path, study, search, own_recipe, 1.0)
    table = [float(row["usd_per_point"] or "nan") for row in lines(tmp_path)]
    assert table == pytest.approx([math.nan, 0.5, math.nan, -0.5, math.nan], nan_ok=True)
    rows = re.findall(
        r"<tr><td>(\d)</td><td>.*>([^<]+)</td><td>[^<]*</td></tr>", (tmp_path / "report.html").read_text()
    )
    assert [told for _, told in sorted(rows)] == ["–", "0.50", "no gain", "cheaper", "–"]


def test_without_a_price_no_dollars_per_point_are_told(usual):
    folder, _, _ = usual
    assert {row["usd_per_point"] for row in lines(folder)} == {""}
    assert "$ per point" not in (folder / "report.html").read_text()


def test_a_search_leaves_its_tables_plots_and_page(usual):
    folder, outcome, study = usual
    assert files(folder) == TABLES | PLOTS
    for name in PLOTS:
        width, height = Image.open(folder / name).size
        assert width > 1000
        assert height > 250
    best = study.best_trial
    assert read(folder, "best.json") == {
        "trial": best.number,
        "values": {"val/accuracy": best.value},
        "parameters": best.params,
    }
    assert (outcome.best_trial, outcome.best_params) == (best.number, best.params)
    states = [trial.state.name for trial in study.trials]
    assert outcome.trials == {"complete": states.count("COMPLETE"), "pruned": states.count("PRUNED"), "failed": 0}
    assert read(folder, "metrics.json")["search"] == {
        "best_val_accuracy": best.value,
        "own_val_accuracy": study.trials[0].value,
        "trials": 30,
        "pruned": outcome.trials["pruned"],
        "failed": 0,
        "epochs": 30 * EPOCHS,
        "minutes": 1.25,
    }
    assert outcome.metrics()["search/best_val_accuracy"] == best.value
    assert outcome.tags()["best/optimizer.learning_rate"] == str(best.params["optimizer.learning_rate"])


def test_each_trial_has_its_line(usual):
    folder, _, study = usual
    table = lines(folder)
    assert [int(line["trial"]) for line in table] == list(range(30))
    for line, trial in zip(table, study.trials, strict=True):
        assert line["state"] == {"COMPLETE": "complete", "PRUNED": "pruned"}[trial.state.name]
        assert line["val/accuracy"] == ("" if line["state"] == "pruned" else str(trial.value))
        assert {name: line[name] for name in SPACE if line[name]} == {k: str(v) for k, v in trial.params.items()}


def test_the_page_says_what_was_gained_and_what_not_to_believe(usual):
    folder, outcome, study = usual
    gain = 100 * (study.best_value - study.trials[0].value)
    assert f"{gain:.2f} points above the experiment's own values" in outcome.sentence
    page = (folder / "report.html").read_text()
    assert f"{gain:.2f} points above" in page
    assert "biased upwards" in page
    assert page.count("data:image/png;base64,") == len(PLOTS)
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("<tr><td>") >= 30


def test_equal_studies_give_equal_bytes(usual, tmp_path, own_recipe):
    folder, _, study = usual
    outcome_of(tmp_path, searching(), own_recipe, study)
    for name in files(folder):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("method", ["ped_anova", "fanova"])
def test_what_matters_is_found_important(method, tmp_path, own_recipe):
    search = searching(importance=method)
    outcome = outcome_of(tmp_path, search, own_recipe, searched(search, trials=60))
    shares = outcome.importances["val/accuracy"]
    assert next(iter(shares)) == "optimizer.learning_rate"
    assert shares["optimizer.learning_rate"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    if method == "fanova":
        assert "optimizer.momentum" not in shares
        assert (
            "optimizer.momentum: not evaluated, fANOVA needs it in every trial"
            in (tmp_path / "report.html").read_text()
        )
    else:
        assert set(shares) == set(SPACE)


def test_of_few_trials_importances_are_a_rough_guess_and_those_given_up_count(tmp_path, own_recipe):
    """As in the search `quick`: what ruined the trials that were given up is what matters."""
    search = searching({"optimizer.learning_rate": RATE, "model.dense_dropout": DROPOUT})
    study = searched(search, lambda c, n: [0.9 if c["optimizer.learning_rate"] > 1e-3 else 0.3] * EPOCHS, trials=7)
    outcome = outcome_of(tmp_path, search, own_recipe, study)
    assert outcome.trials["pruned"] > 1
    assert outcome.trials["complete"] < 6
    assert next(iter(outcome.importances["val/accuracy"])) == "optimizer.learning_rate"
    assert "importance/optimizer.learning_rate" in outcome.tags()
    assert "of 7 trials only, so a rough guess" in (tmp_path / "report.html").read_text()


def test_a_trial_with_a_smaller_batch_than_asked_for_is_told(tmp_path, own_recipe):
    study, halved = searched(searching(), trials=3), optuna.create_study(direction="maximize")
    for trial in study.trials:
        trial.user_attrs |= {"smaller_batch": 16} if trial.number == 1 else {}
        halved.add_trial(trial)
    outcome = outcome_of(tmp_path, searching(), own_recipe, halved)
    said = "Memory did not suffice for the batch size that was asked for: trial 1 with 16 instead."
    assert outcome.caveat.endswith(said)
    assert said in (tmp_path / "report.html").read_text()
    assert [line["smaller_batch"] for line in lines(tmp_path)] == ["0", "16", "0"]


def test_importance_is_for_getting_good_not_bad(tmp_path, own_recipe):
    def world(chosen: Chosen, noise: random.Random) -> list[float]:
        good = 0.1 if chosen["model.dense_dropout"] < 0.08 else 0.0
        bad = 0.1 if chosen["optimizer.learning_rate"] < 2.5e-4 else 0.0
        return [0.8 + good - bad + noise.uniform(0, 0.01)] * EPOCHS

    search = searching({"optimizer.learning_rate": RATE, "model.dense_dropout": DROPOUT})
    outcome = outcome_of(tmp_path, search, own_recipe, searched(search, world, trials=60))
    assert next(iter(outcome.importances["val/accuracy"])) == "model.dense_dropout"


def test_own_values_count_only_where_they_were_tried(tmp_path, own_recipe):
    search = searching()
    strange = own_values(search, own_recipe) | {"trainer.batch_size": "32"}
    outcome = outcome_of(tmp_path, search, own_recipe, searched(search, trials=3, first=strange))
    assert outcome.own_values == {}
    assert "own values are not among the complete trials" in outcome.sentence


def test_nothing_better_than_the_own_values_is_said(tmp_path, own_recipe):
    search = searching({"optimizer.learning_rate": RATE, "model.dense_dropout": DROPOUT})
    recipe = patch(own_recipe, {"optimizer.learning_rate": 0.003})
    study = searched(search, lambda c, n: rate_matters(c, random.Random(0)), first=own_values(search, recipe))
    outcome = outcome_of(tmp_path, search, recipe, study)
    assert outcome.best_trial == 0
    assert outcome.sentence.startswith("None of 30 trials is better than the experiment's own values (trial 0)")


def test_trials_of_a_larger_budget_before_are_nowhere(tmp_path, own_recipe):
    search = searching({"model.dense_dropout": DROPOUT})
    study = searched(search, better_with_dropout, trials=12)
    study.enqueue_trial({})
    best = max(study.trials[:5], key=lambda trial: trial.value)
    assert best.number != study.best_trial.number
    outcome = outcome_of(tmp_path, replace(search, budget=BudgetConfig(5)), own_recipe, study)
    assert [int(line["trial"]) for line in lines(tmp_path)] == list(range(5))
    assert (outcome.best_trial, outcome.trials["complete"]) == (best.number, 5)


def test_two_objectives_have_a_front(tmp_path, own_recipe):
    search = searching(objectives=(ObjectiveConfig("val/accuracy", "maximize"), COST), pruner=PrunerConfig("none"))
    study = searched(search)
    outcome = outcome_of(tmp_path, search, own_recipe, study)
    assert set(outcome.front) == {trial.number for trial in study.best_trials}
    assert len(outcome.front) > 1
    assert outcome.best_values["val/accuracy"] == max(trial.values[0] for trial in study.trials)
    assert files(tmp_path) == (TABLES | PLOTS | {"pareto.png"}) - {"intermediate.png"}
    assert {entry["trial"] for entry in read(tmp_path, "best.json")["front"]} == set(outcome.front)
    assert set(outcome.importances) == {"val/accuracy", "cost/usd"}
    assert "Curves: with several objectives" in (tmp_path / "report.html").read_text()


def failing(reason: str) -> World:
    return lambda chosen, noise: reason


def equal(chosen: Chosen, noise: random.Random) -> list[float]:
    return [0.9] * EPOCHS


def pruned(chosen: Chosen, noise: random.Random) -> list[float]:
    return [0.1] * EPOCHS


def better_with_dropout(chosen: Chosen, noise: random.Random) -> list[float]:
    return [0.9 + 0.1 * float(chosen.get("model.dense_dropout", 0.5))] * EPOCHS


CHOICES = {
    "trainer.batch_size": Choice("categorical", [32, 64]),
    "model.dropout": Choice("categorical", ["none", "both"]),
}


@pytest.mark.parametrize(
    ("space", "world", "trials", "drawn"),
    [
        (SPACE, failing("out of memory"), 4, set()),
        (SPACE, pruned, 3, {"history", "intermediate"}),
        (SPACE, rate_matters, 1, {"history", "intermediate"}),
        (SPACE, equal, 10, PLOTS - {"importance.png"}),
        ({"model.dense_dropout": DROPOUT}, better_with_dropout, 10, PLOTS - {"contour.png"}),
        (CHOICES, equal, 9, PLOTS - {"importance.png"}),
        ({"trainer.batch_size": Choice("categorical", [64])}, equal, 9, {"history", "intermediate"}),
    ],
    ids=["all failed", "all pruned", "one trial", "equal values", "one parameter", "choices only", "constant"],
)
def test_a_poor_study_has_what_makes_sense_of_it(space, world, trials, drawn, tmp_path, own_recipe):
    search = searching(space)
    outcome = outcome_of(tmp_path, search, own_recipe, searched(search, world, trials=trials))
    wanted = {name.removesuffix(".png") for name in drawn}
    assert files(tmp_path) == TABLES | {f"{stem}.png" for stem in wanted}
    page = (tmp_path / "report.html").read_text()
    captions = {"history": "History", "intermediate": "Curves", "importance": "Importance: not evaluated",
                "parallel": "Parallel", "slice": "Slices", "contour": "Contour"}  # fmt: skip
    for stem, caption in captions.items():
        assert (f"<li>{caption}" in page) == (stem not in wanted), caption
    assert outcome.sentence in page.replace("&#39;", "'")
    if not any(line["state"] == "complete" for line in lines(tmp_path)):
        assert outcome.best_trial is None
        assert outcome.best_params == {}
        assert outcome.sentence.startswith("No trial completed")
        assert "best_val_accuracy" not in read(tmp_path, "metrics.json")["search"]


def test_a_failure_is_told_with_its_reason(tmp_path, own_recipe):
    search = searching()
    world = failing("the loss is <not> finite")
    outcome = outcome_of(tmp_path, search, own_recipe, searched(search, world, trials=2))
    assert "2 failed (the first: the loss is <not> finite)" in outcome.sentence
    assert "the loss is &lt;not&gt; finite" in (tmp_path / "report.html").read_text()
    assert {line["reason"] for line in lines(tmp_path)} == {"the loss is <not> finite"}


def test_of_a_lower_loss_more_is_thought(tmp_path, own_recipe):
    search = searching(objectives=(ObjectiveConfig("val/loss", "minimize"),))
    search = replace(search, space={"optimizer.learning_rate": RATE, "model.dense_dropout": DROPOUT})
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: suggest(trial, search)["optimizer.learning_rate"], n_trials=25)
    outcome = outcome_of(tmp_path, search, own_recipe, study)
    assert outcome.best_values["val/loss"] == study.best_value
    assert next(iter(outcome.importances["val/loss"])) == "optimizer.learning_rate"
    assert (tmp_path / "contour.png").exists()


ENDS = (
    st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
    .map(sorted)
    .filter(lambda ends: 1.001 * ends[0] < ends[1])
)


@given(ends=ENDS, log=st.booleans())
def test_every_value_and_tick_is_on_its_axis(ends, log):
    scale = dimension_scale("x", FloatRange("float", ends[0], ends[1], log=log))
    assert scale.part(ends[0]) == pytest.approx(0)
    assert scale.part(ends[1]) == pytest.approx(1)
    readable(scale)


def test_ends_whose_logarithms_are_one_number_are_in_the_middle():
    scale = dimension_scale("x", FloatRange("float", 999999.9999999999, 1000000.0, log=True))
    assert scale.part(1000000.0) == 0.5


@given(values=st.lists(st.integers(0, 10_000).map(lambda right: right / 10_000), min_size=1, max_size=20))
def test_an_axis_of_accuracies_keeps_their_order(values):
    scale = metric_scale("val/accuracy", values)
    parts = [scale.part(value) for value in sorted(values)]
    assert parts == sorted(parts)
    assert all(-1e-9 <= part <= 1 + 1e-9 for part in parts)
    readable(scale)


def readable(scale) -> None:
    """Check that ticks lie on the axis, apart from each other, and that no two read alike."""
    places = [(place - scale.low) / (scale.high - scale.low) for place, _ in scale.ticks]
    assert places == sorted(places)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
    assert all(b - a > 0.05 for a, b in pairwise(places))
    assert len({text for _, text in scale.ticks}) == len(scale.ticks)


def test_accuracies_far_apart_leave_room_for_the_good_ones():
    scale = metric_scale("val/accuracy", [0.1, 0.95, 0.99])
    assert scale.part(0.95) < 0.7
    assert metric_scale("val/accuracy", [0.985, 0.99]).part(0.9875) == pytest.approx(0.5)


@given(ends=st.tuples(st.integers(-50, 50), st.integers(1, 200)), log=st.booleans())
def test_whole_numbers_have_whole_ticks(ends, log):
    low, more = ends
    low = max(low, 1) if log else low
    scale = dimension_scale("n", IntRange("int", low, low + more, log=log))
    assert all("." not in text or log for _, text in scale.ticks)
    readable(scale)


def test_names_are_as_short_as_they_can_be():
    assert short_names(["optimizer.learning_rate", "model.dropout", "optimizer", "augment.dropout"]) == {
        "optimizer.learning_rate": "learning rate",
        "model.dropout": "model dropout",
        "optimizer": "optimizer",
        "augment.dropout": "augment dropout",
    }
