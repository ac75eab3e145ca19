"""Dollars for each point of accuracy: a ratio with an interval, or none where there may be no gain."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from ablation_studies import result, study
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from cnn_tuning.ablation.compare import compare
from cnn_tuning.ablation.outcome import write_outcome
from cnn_tuning.config import QuestionConfig
from cnn_tuning.evaluation.chapters import worth
from cnn_tuning.statistics import Estimate, ratio_interval

QUESTION = QuestionConfig("Does it help?", {"model.dropout": ["none", "both"]})
NUMBERS = st.lists(st.tuples(st.floats(-10, 10), st.floats(0.5, 3)), min_size=3, max_size=8)


@given(pairs=NUMBERS, confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_the_ends_are_the_ratios_that_a_t_test_just_rules_out(pairs, confidence):
    above, below = (np.array(x) for x in zip(*pairs, strict=True))
    assume(np.ptp(below) > 1e-3 and np.ptp(above) > 1e-3)
    found = ratio_interval(above, below, confidence)
    clear = ttest_1samp(below, 0).pvalue < 1 - confidence
    assert (found is not None) == clear
    if found is None:
        return
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(above.mean() / below.mean())
    for end in (found.low, found.high):
        rest = above - end * below
        assume(np.ptp(rest) > 1e-6)
        assert ttest_1samp(rest, 0).pvalue == pytest.approx(1 - confidence, rel=1e-3, abs=1e-6)


def priced(results, dollars):
    """Return results at dollars of an arm, a little more each seed."""
    return [replace(r, usd=dollars[r.arm] * (1 + 0.01 * r.seed)) for r in results]


def test_a_clear_gain_has_its_price_and_an_open_one_has_none(tmp_path):
    found = study(np.random.default_rng(0), {"none": 0.0, "same": 0.0, "both": 3.0})
    results = priced(found, {"none": 0.1, "same": 0.3, "both": 0.2})
    outcome = write_outcome(tmp_path, "dropout", replace(QUESTION, reference="none"), results, 0.95)
    same, both = outcome.comparisons
    assert same.usd_per_point is None
    gain = 100 * both.accuracy.value
    assert both.usd_per_point.value == pytest.approx(float(np.mean(both.usd)) / gain)
    assert both.usd_per_point.low < both.usd_per_point.value < both.usd_per_point.high
    with (tmp_path / "comparisons.csv").open() as file:
        open_one, clear = csv.DictReader(file)
    assert (open_one["usd_per_point"], open_one["usd_per_point_low"]) == ("", "")
    assert float(clear["usd_per_point"]) == pytest.approx(both.usd_per_point.value)
    assert float(open_one["usd_difference"]) == pytest.approx(0.2, rel=0.05)
    with (tmp_path / "arms.csv").open() as file:
        arms = {row["arm"]: row for row in csv.DictReader(file)}
    assert float(arms["both"]["usd"]) == pytest.approx(0.204)
    assert float(arms["both"]["usd_std"]) == pytest.approx(0.2 * 0.01 * np.std(range(5), ddof=1))
    assert outcome.costs[0] == f"15 trainings cost ${sum(r.usd for r in results):.2f}"
    assert [line.split()[0] for line in outcome.costs[1:]] == ["both"]
    texts = [[cell.text for cell in row] for row in outcome.page.comparisons.rows]
    assert texts[0][-1] == "no gain shown"
    assert "Fieller" in outcome.page.note
    metrics = outcome.metrics()
    assert metrics["dropout/both against none/usd_per_point"] == pytest.approx(both.usd_per_point.value)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_cheaper_but_worse_arm_says_what_is_saved_for_each_point_lost():
    rng = np.random.default_rng(0)
    results = priced(study(rng, {"good": 3.0, "bad": 0.0}), {"good": 0.3, "bad": 0.1})
    (c,) = compare(results, reference="good", pairs=False, confidence=0.95)
    assert c.accuracy.value < 0
    assert c.usd_per_point.low > 0


def test_one_seed_and_no_price_make_no_ratio(tmp_path):
    one = [result("a", 0, [True, False] * 20), result("b", 0, [True] * 40)]
    (c,) = compare(one, reference="a", pairs=False, confidence=0.95)
    assert c.usd_per_point is None
    free = priced(study(np.random.default_rng(0), {"none": 0.0, "both": 3.0}), {"none": 0.0, "both": 0.0})
    outcome = write_outcome(tmp_path, "free", QUESTION, free, 0.95)
    assert outcome.costs == ()
    assert not any("$" in head for head in (*outcome.page.arms.head, *outcome.page.comparisons.head))


def test_what_tuning_cost_is_bounded_by_the_interval_of_its_gain():
    sentence, figures = worth(2.0, Estimate(0.02, 0.01, 0.04))
    assert "$1.00 [0.50, 2.00]" in sentence
    assert figures == {
        "tuning_usd": 2.0,
        "usd_per_point": 1.0,
        "usd_per_point_low": 0.5,
        "usd_per_point_high": 2.0,
    }
    open_gain, figures = worth(2.0, Estimate(0.01, -0.01, 0.04))
    assert "at least $0.50" in open_gain
    assert "usd_per_point" not in figures
    assert "gained no" in worth(2.0, Estimate(-0.02, -0.03, -0.01))[0]
    assert worth(0.0, Estimate(0.01, 0.0, 0.02)) == ("", {})
