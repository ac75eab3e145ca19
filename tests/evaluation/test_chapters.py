"""Chapters of the report from what the stages before really write, also where their results are poor."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from ablation_studies import failed, result, study
from searching import search_with

from cnn_tuning.ablation.outcome import write_outcome as write_ablation
from cnn_tuning.config import QuestionConfig, to_plain
from cnn_tuning.evaluation import chapters
from cnn_tuning.evaluation.chapters import Folders
from cnn_tuning.search.outcome import write_outcome as write_search

TRAINING = {"seconds": {"fit": 30.0}}


def ablate(folder, name, results):
    question = QuestionConfig(
        "Does it help?", factors={"model.dropout": ["none", "both"]}, reference=results[0].arm
    )
    write_ablation(folder / name, name, question, results, 0.95)


def test_a_clear_difference_is_strong_and_a_failed_arm_is_told(tmp_path):
    rng = np.random.default_rng(0)
    ablate(tmp_path, "clear", study(rng, {"a": 0.0, "b": 3.0}))
    ablate(tmp_path, "one_seed", study(rng, {"a": 0.0, "b": 3.0}, seeds=1))
    ablate(tmp_path, "lost", [result("a", 0, [True] * 9), failed("b", 0)])
    clear, lost, one = chapters.ablation(tmp_path)
    assert [q["name"] for q in (clear, lost, one)] == ["clear", "lost", "one_seed"]
    accuracy, gap = clear["table"].rows[0][3:5]
    assert accuracy.strong
    assert accuracy.text.startswith("+")
    assert "[" in accuracy.text
    assert not gap.strong or "[" in gap.text
    assert [caption for caption, _ in clear["pictures"]] == ["Differences and their intervals"]
    assert "no longer finite" in lost["verdicts"][0]
    assert [cell.text for cell in lost["table"].rows[0][3:]] == ["–", "–", "–"]
    assert not one["table"].rows[0][3].strong  # without a spread nothing is claimed
    assert "[" not in one["table"].rows[0][3].text


def searched(folder, recipe, ends, **changes):
    """Write the outcome of a search whose trials end with these values, or fail where there is none."""
    search = search_with(**changes)
    found = optuna.create_study(directions=[o.direction for o in search.objectives])
    space = {"optimizer.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)}
    for number, values in enumerate(ends):
        state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL
        found.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params={"optimizer.learning_rate": 0.001 * (number + 1)},
                distributions=space,
                user_attrs={"seconds": 20.0, "epochs": 1},
            )
        )
    folder.mkdir()
    write_search(folder, found, search, recipe)
    return chapters.search(folder, to_plain(recipe))


def test_a_search_tells_its_best_values_beside_the_experiments_own(tmp_path, recipe):
    found = searched(tmp_path / "s", recipe, [[0.9], [0.95], None])
    assert found["sentence"] == (
        "3 trials, 0 of them pruned and 1 failed. Trial 1 was the best: validation accuracy 95.00%."
    )
    assert found["parameters"] == [
        ("optimizer.learning_rate", "0.002", f"{recipe.optimizer.learning_rate:g}", "–")
    ]
    assert found["refit"] == ""
    (tmp_path / "s/refit.csv").write_text("seed,val/accuracy,seconds\n0,0.97,5\n1,0.99,5\n")
    assert "98.00% validation accuracy (mean of 2 seeds" in chapters.search(tmp_path / "s", {})["refit"]


def test_a_search_without_a_complete_trial_leaves_the_experiments_values(tmp_path, recipe):
    found = searched(tmp_path / "s", recipe, [None, None])
    assert "none completed" in found["sentence"]
    assert found["parameters"] == []


def test_of_several_objectives_the_best_is_that_of_the_first(tmp_path, recipe):
    objectives = [{"metric": "val/accuracy", "direction": "maximize"},
                  {"metric": "model/parameters", "direction": "minimize"}]  # fmt: skip
    found = searched(
        tmp_path / "s", recipe, [[0.9, 100], [0.95, 900]], objectives=objectives, pruner={"name": "none"}
    )
    assert "Trial 1 was the best in validation accuracy of the 2 on the Pareto front" in found["sentence"]
    assert "parameters of the network 900" in found["sentence"]


def test_what_was_spent_adds_up(tmp_path, recipe):
    ablate(tmp_path / "ablation", "dropout", study(np.random.default_rng(0), {"a": 0.0, "b": 1.0}, seeds=2))
    searched(tmp_path / "search", recipe, [[0.9], [0.95], None])
    (tmp_path / "search/refit.csv").write_text("seed,val/accuracy,seconds\n0,0.97,50\n")
    folders = Folders(*(tmp_path / name for name in ("data", "training", "ablation", "search", "diagnosis")))
    folders.training.mkdir()
    (folders.training / "profile.html").touch()
    spent = chapters.spent(folders, TRAINING, price_per_hour=3.6)
    assert [row[:3] for row in spent["rows"]] == [
        ("training of the baseline", "1", "30.0 s"),
        ("ablations", "4", "40.0 s"),  # 10 s each
        ("search", "3", "60.0 s"),
        ("refit of the best trial", "1", "50.0 s"),
        ("all", "9", "3 min 0 s"),
    ]
    assert spent["rows"][-1][3] == "$0.18"
    assert spent["profiles"] == [str(tmp_path / "training/profile.html")]
    alone = chapters.spent(Folders(*[tmp_path / "none"] * 5), TRAINING, 0.0)
    assert [row[0] for row in alone["rows"]] == ["training of the baseline"]
    assert not alone["priced"]


def test_chapters_of_stages_that_left_nothing_are_none(tmp_path):
    (tmp_path / "metrics.json").write_text("{}\n")  # as the stages write it where there is nothing to do
    for nothing in (tmp_path, tmp_path / "missing"):
        assert chapters.ablation(nothing) is None
        assert chapters.search(nothing, {}) is None
        assert chapters.diagnosis(nothing) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.94, "99.9 s"), (119.6, "2 min 0 s"), (3599.7, "1 h 0 min")]
)
def test_times_are_read_at_a_glance(seconds, text):
    assert chapters.duration(seconds) == text
