"""What an ablation writes: tables a program reads, sentences, pictures and a page a person reads."""

from __future__ import annotations

import csv
import html
import json
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from ablation_studies import failed, study

from cnn_tuning.ablation.compare import by_arm
from cnn_tuning.ablation.outcome import Outcome, write_outcome
from cnn_tuning.config import QuestionConfig
from cnn_tuning.reports.ablation import write_report

DROPOUT = QuestionConfig("Does dropout help?", {"model.dropout": ["none", "conv", "both"]})
CELLS = [f"learning_rate={rate}, batch_size={size}" for rate in ("0.001", "0.0003", "0.01") for size in (32, 1000)]
GRID = QuestionConfig("Both?", {"optimizer.learning_rate": [1e-3, 3e-4, 1e-2], "trainer.batch_size": [32, 1000]})


@dataclass(frozen=True)
class Written:
    """An outcome, its folder, and the results it is made of."""

    outcome: Outcome
    folder: Path
    results: list


def dropout(folder: Path, seeds: int = 3) -> Written:
    rng = np.random.default_rng(0)
    results = study(rng, {"dropout=none": 0.0, "dropout=conv": 0.0, "dropout=both": 1.5}, seeds=seeds)
    return Written(write_outcome(folder, "dropout", DROPOUT, results, 0.95), folder, results)


@pytest.fixture(scope="module")
def simple(tmp_path_factory) -> Written:
    """One factor, three arms, three seeds; one arm is better."""
    return dropout(tmp_path_factory.mktemp("dropout"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Written:
    """Two factors; one arm failed with all seeds, the reference with one."""
    folder = tmp_path_factory.mktemp("rate_and_batch")
    results = study(np.random.default_rng(0), dict.fromkeys(CELLS, 0.0), seeds=3)
    results = [failed(r.arm, r.seed) if r.arm == CELLS[-1] or r is results[0] else r for r in results]
    return Written(write_outcome(folder, "rate_and_batch", GRID, results, 0.95), folder, results)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def size(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def test_tables_hold_every_training_and_its_means(simple):
    runs = rows(simple.folder / "runs.csv")
    assert [(r["arm"], int(r["seed"])) for r in runs] == [(r.arm, r.seed) for r in simple.results]
    arms = {row["arm"]: row for row in rows(simple.folder / "arms.csv")}
    for arm, own in by_arm(simple.results).items():
        accuracies = [r.val_accuracy for r in own]
        gaps = [r.gap for r in own]
        row = {name: float(value or "nan") for name, value in arms[arm].items() if name not in ("arm", "findings")}
        assert row["val_accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["val_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
        assert row["gap"] == pytest.approx(np.mean(gaps))
        assert row["gap_std"] == pytest.approx(np.std(gaps, ddof=1))
        assert row["last_val_accuracy"] == pytest.approx(np.mean([r.last_val_accuracy for r in own]))
        assert (row["seeds"], row["failed"], row["seconds"], row["updates"]) == (3, 0, 10, 40)
    conv, both = rows(simple.folder / "comparisons.csv")
    assert (both["arm"], both["reference"], both["seeds"]) == ("dropout=both", "dropout=none", "3")
    for row in (conv, both):
        assert float(row["accuracy_low"]) <= float(row["accuracy_difference"]) <= float(row["accuracy_high"])
    assert float(both["mcnemar_p"]) < 0.001
    said = (simple.folder / "verdicts.txt").read_text().splitlines()
    assert tuple(said) == simple.outcome.verdicts
    assert [line.split()[0] for line in said] == ["dropout=conv", "dropout=both"]


def test_each_figure_says_which_epoch_it_is_of(simple):
    head = simple.outcome.page.arms.head
    assert {"val accuracy (best epoch), %", "val accuracy (last epoch), %", "gap (last epoch), points"} <= {*head}
    for run in rows(simple.folder / "runs.csv"):
        (made,) = [r for r in simple.results if (r.arm, str(r.seed)) == (run["arm"], run["seed"])]
        assert float(run["last_val_accuracy"]) == made.last_val_accuracy != float(run["val_accuracy"])
        # Both of the last epoch: their sum is the training accuracy there, not that of the same line.
        assert float(run["gap"]) + float(run["last_val_accuracy"]) == pytest.approx(made.train_accuracy)


def test_that_the_best_of_more_epochs_is_favoured_is_said(simple, tmp_path):
    assert not [line for line in simple.outcome.verdicts if "best epoch" in line]
    longer = [replace(r, epochs=31) if r.arm == "dropout=both" else r for r in simple.results]
    said = write_outcome(tmp_path / "epochs", "q", DROPOUT, longer, 0.95).verdicts[0]
    assert "the best of more epochs is better by chance alone" in said
    last = 100 * np.mean([r.last_val_accuracy for r in longer if r.arm == "dropout=both"])
    assert f"dropout=both {last:.2f} %" in said
    parts = QuestionConfig("Forgotten?", {"trainer.sequential_parts": {"joint": 1, "parts": 5}})
    arms = {"dropout=none": "joint", "dropout=both": "parts"}
    learnt = [replace(r, arm=arms[r.arm]) for r in simple.results if r.arm in arms]
    said = write_outcome(tmp_path / "parts", "q", parts, learnt, 0.95).verdicts[0]
    assert "what was forgotten after it does not show. After the last epoch: joint " in said


def test_an_arm_that_was_trained_with_a_smaller_batch_is_told(simple, tmp_path):
    small = [replace(r, smaller_batch=16) if r.arm == "dropout=both" and r.seed else r for r in simple.results]
    said = write_outcome(tmp_path, "q", DROPOUT, small, 0.95).verdicts[0]
    assert said.startswith(
        "dropout=both was trained with batch size 16 (2 of 3 trainings): memory did not suffice"
    )


def test_what_failed_is_empty_in_the_tables_and_said(grid):
    run = rows(grid.folder / "runs.csv")[-1]
    assert (run["arm"], run["val_accuracy"], run["gap"]) == (CELLS[-1], "", "")
    assert run["failure"] == "the loss is no longer finite at step 120"
    arms = rows(grid.folder / "arms.csv")
    assert [(int(a["seeds"]), int(a["failed"])) for a in arms] == [(2, 1), *[(3, 0)] * 4, (0, 3)]
    assert arms[-1]["val_accuracy"] == arms[-1]["seconds"] == ""
    assert rows(grid.folder / "comparisons.csv")[-1]["mcnemar_p"] == ""
    assert f"{CELLS[-1]} did not finish with any of 3 seeds" in grid.outcome.verdicts[1]


def test_metrics_are_numbers_under_names_that_mlflow_and_json_take(simple, grid):
    metrics = simple.outcome.metrics() | grid.outcome.metrics()
    mean = np.mean([r.val_accuracy for r in simple.results if r.arm == "dropout=both"])
    assert metrics["dropout/both/val_accuracy"] == pytest.approx(mean)
    assert metrics["dropout/none/failed"] == 0
    low = simple.outcome.comparisons[1].accuracy.interval.low
    assert metrics["dropout/both against none/accuracy_difference_low"] == low
    assert metrics["rate_and_batch/learning_rate 0.01 batch_size 1000/failed"] == 3
    assert "rate_and_batch/learning_rate 0.01 batch_size 1000/val_accuracy" not in metrics
    assert all(re.fullmatch(r"[\w./ -]+", name, re.ASCII) for name in metrics)
    json.dumps(metrics, allow_nan=False)


def test_labels_that_differ_in_odd_characters_stay_apart(tmp_path):
    question = QuestionConfig("?", {"augment": ["a"]}, compare="pairs")
    labels = ("augment=a+b", "augment=a*b", "augment=..", "augment=é")
    results = study(np.random.default_rng(0), dict.fromkeys(labels, 0.0), seeds=1)
    metrics = write_outcome(tmp_path, "odd", question, results, 0.95).metrics()
    assert len({name.split("/")[1] for name in metrics if name.endswith("/val_accuracy")}) == 4
    assert len([name for name in metrics if name.endswith("mcnemar_p")]) == 6
    assert all(re.fullmatch(r"[\w./ -]+", name, re.ASCII) for name in metrics)
    assert not any(part in ("", ".", "..") for name in metrics for part in name.split("/"))


def test_pictures_show_what_there_is(simple, grid, tmp_path):
    one = dropout(tmp_path, seeds=1)
    drawn = [sorted(p.name for p in w.folder.glob("*.png")) for w in (simple, grid, one)]
    assert drawn[0] == ["arms.png", "differences.png", "gap.png"]
    assert drawn[1] == ["arms.png", "differences.png", "gap.png", "heatmap.png"]
    assert drawn[2] == ["arms.png", "gap.png"]  # one seed has no interval to draw
    for written in (simple, grid, one):
        assert all(150 < side < 3000 for _, path in written.outcome.page.pictures for side in size(path))


def test_a_grid_at_equal_updates_has_a_second_heat_map(grid, tmp_path):
    more = [f"{label}, equal updates" for label in CELLS if "1000" in label]
    results = study(np.random.default_rng(0), dict.fromkeys([*CELLS, *more], 0.0), seeds=1)
    write_outcome(tmp_path, "grid", GRID, results, 0.95)
    (width, height), (own, once) = size(tmp_path / "heatmap.png"), size(grid.folder / "heatmap.png")
    assert (width, height) == (own, pytest.approx(2 * once, rel=0.02))


def test_equal_results_are_equal_bytes(simple, tmp_path):
    again = dropout(tmp_path)
    for written in (simple, again):
        write_report(written.folder / "report.html", [written.outcome], {"data": "made"})
    files = [{p.name: p.read_bytes() for p in written.folder.iterdir()} for written in (simple, again)]
    assert files[0] == files[1]
    assert len(files[0]) == 8


def test_the_page_says_first_what_was_found(simple, grid, tmp_path):
    outcomes = [simple.outcome, grid.outcome]
    odd = study(np.random.default_rng(1), {"augment=<b>&": 0.0, "augment=x": 0.0}, seeds=1)
    outcomes.append(write_outcome(tmp_path / "odd", "odd <i>", DROPOUT, odd, 0.95))
    write_report(tmp_path / "report.html", outcomes, {"data digest": "abc123"})
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 4 + 2
    assert "<b>&" not in page
    assert "<i>" not in page
    sections = page.split("<h2")[1:]
    for outcome, section in zip(outcomes, sections, strict=False):
        assert outcome.page.question in section
        assert html.escape(outcome.verdicts[0], quote=False) in section.replace("&#39;", "'")
        places = [section.index(part) for part in ("<li class=", "<table", "<img ")]
        assert places == sorted(places)
    assert "How this was computed" in sections[3]
    assert "abc123" in sections[4]
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
