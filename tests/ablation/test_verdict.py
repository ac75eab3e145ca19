"""The sentences: they say what the figures say, in words a person can act on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from ablation_studies import failed, result, study
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.ablation.compare import Comparison, Difference, Images, Result, compare
from cnn_tuning.ablation.verdict import sentences, verdict
from cnn_tuning.statistics import Estimate, each_of, mean_interval

CLEAR = 1 - 0.05 / 6
FEW = Images(41, 35, 0.57)


def difference(*by_seed: float, confidence: float = CLEAR) -> Difference:
    """Return a difference given in percentage points."""
    values = tuple(x / 100 for x in by_seed)
    return Difference(values, 6, confidence, mean_interval(values, confidence))


def comparison(accuracy: Difference, gap: Difference, images: Images | None = None) -> Comparison:
    seeds = tuple(range(len(accuracy.by_seed)))
    return Comparison("dropout=both", "dropout=none", seeds, len(seeds), 0.05, accuracy, gap, images or FEW)


UP = difference(0.30, 0.31, 0.32, 0.29, 0.33)
DOWN = difference(-0.30, -0.31, -0.32, -0.29, -0.33)
OPEN_UP = difference(0.01, 0.10, 0.05, 0.09, 0.00)
OPEN_DOWN = difference(-0.01, -0.10, -0.05, -0.09, -0.00)
ZERO = difference(0, 0, 0, 0, 0)
SAME = difference(0.04, 0.04, 0.04, 0.04, 0.04)
ONE, ONE_LESS = difference(0.16), difference(-0.16)

IMAGES = "on other images these networks need not differ (McNemar: images won 41, lost 35, p = 0.57)."
GAINS = "dropout=both gains 0.31 points of accuracy [0.28, 0.34]"
COSTS = "dropout=both costs 0.31 points of accuracy [0.28, 0.34]"
GAP = "the generalisation gap"
BY = "by 0.31 points [0.28, 0.34]"
AGAINST = "against dropout=none"
LITTLE = "0.05 points [-0.05, 0.15],"
CHANCE = "is not distinguishable from chance with 5 seeds; about 15 seeds would settle it; "


@pytest.mark.parametrize(
    ("accuracy", "gap", "sentence"),
    [
        (UP, DOWN, f"{GAINS} and lowers {GAP} {BY} {AGAINST} with 5 seeds; "),
        (DOWN, UP, f"{COSTS} and raises {GAP} {BY} {AGAINST} with 5 seeds; "),
        (OPEN_UP, DOWN, f"dropout=both lowers {GAP} {BY} {AGAINST}; its gain in accuracy, {LITTLE} {CHANCE}"),
        (OPEN_DOWN, UP, f"dropout=both raises {GAP} {BY} {AGAINST}; its loss in accuracy, {LITTLE} {CHANCE}"),
        (UP, OPEN_UP, f"{GAINS} {AGAINST}; its increase of {GAP}, {LITTLE} {CHANCE}"),
        (
            OPEN_DOWN,
            OPEN_UP,
            f"dropout=both {AGAINST}: neither its loss in accuracy, {LITTLE} nor its increase of {GAP}, {LITTLE} "
            "is distinguishable from chance with 5 seeds; about 15 seeds would settle both; ",
        ),
        (ZERO, ZERO, f"dropout=both makes no difference to accuracy or {GAP} {AGAINST} with 5 seeds; "),
        (
            ZERO,
            OPEN_DOWN,
            f"dropout=both makes no difference to accuracy {AGAINST}; its reduction of {GAP}, {LITTLE} {CHANCE}",
        ),
        (
            SAME,
            DOWN,
            f"dropout=both lowers {GAP} {BY} {AGAINST}; its gain in accuracy, 0.04 points, is the same with "
            "5 seeds, so its spread is unknown and nothing is claimed; ",
        ),
        (
            ONE,
            ONE_LESS,
            f"dropout=both gains 0.16 points of accuracy and lowers {GAP} by 0.16 points {AGAINST}, but with one "
            "seed only: another may show otherwise; ",
        ),
    ],
    ids=["gain", "loss", "gap", "gap too", "accuracy", "nothing", "zero", "zero and open", "same", "one seed"],
)
def test_sentence(accuracy, gap, sentence):
    assert verdict(comparison(accuracy, gap)) == sentence + IMAGES


@pytest.mark.parametrize(
    ("accuracy", "gap", "needed"),
    [
        (difference(-1, 0, 1.01), UP, "settling it would take more than 1,000 seeds"),
        (difference(-1, 0, 1.01), difference(1.01, -1, 0), "settling both would take more than 1,000 seeds"),
        (difference(-1, 0, 1.01), difference(-0.5, 0.5, 1.5),
         "settling the accuracy would take more than 1,000 seeds, the gap about 55"),
        (difference(-0.8, 0.2, 1.2), UP, "about 350 seeds would settle it"),
    ],
)  # fmt: skip
def test_how_many_seeds_would_settle_it(accuracy, gap, needed):
    assert f"; {needed}; " in verdict(comparison(accuracy, gap))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (Images(61, 22, 0.000023), "likely differ too (McNemar: images won 61, lost 22, p < 0.0001)."),
        (Images(1061, 980, 0.0496), "likely differ too (McNemar: images won 1,061, lost 980, p = 0.0496)."),
        (Images(41, 25, 0.0504), "need not differ (McNemar: images won 41, lost 25, p = 0.05)."),
        (Images(0, 0, 1.0), "no image tells these networks apart."),
    ],
)
def test_what_is_said_of_other_images(images, said):
    assert verdict(comparison(UP, DOWN, images)).endswith(said)


def test_no_bound_seems_to_be_zero():
    """What rounds to 0.00 is given with more digits: a clear effect is not to look unclear, nor the reverse."""
    clear = replace(UP, interval=Estimate(0.0031, 0.00003, 0.0061))
    assert "gains 0.310 points of accuracy [0.003, 0.610]" in verdict(comparison(clear, DOWN))
    unclear = replace(UP, interval=Estimate(0.0031, -0.00004, 0.0062))
    assert "its gain in accuracy, 0.310 points [-0.004, 0.620], is not" in verdict(comparison(unclear, DOWN))


def test_failed_arms_are_said_first_and_compared_where_they_can_be():
    rng = np.random.default_rng(0)
    results = study(rng, {"lr=0.1": 0, "lr=0.2": 0, "lr=0.3": 0, "lr=0.4": 0}, seeds=3)
    results = [
        failed(r.arm, r.seed) if r.arm == "lr=0.4" or (r.arm, r.seed) == ("lr=0.3", 2) else r for r in results
    ]
    said = sentences(results, compare(results, reference="lr=0.1", pairs=False, confidence=0.95))
    assert [s.kind for s in said][:2] == ["failed", "failed"]
    assert said[0].text == "lr=0.3 did not finish with 1 of 3 seeds: the loss is no longer finite at step 120."
    assert said[1].text == "lr=0.4 did not finish with any of 3 seeds: the loss is no longer finite at step 120."
    assert len(said) == 4
    assert "with the 2 seeds of 3 that both finished" in said[3].text


def test_trainings_of_different_devices_are_told_before_any_difference():
    results = [result("a=1", 0, [1, 0]), result("a=1", 1, [1, 1]), result("a=2", 0, [1, 1]), failed("a=2", 1)]
    places = ("cpu 32-true", "cpu 32-true", "cuda bf16-mixed", "")
    results = [replace(r, made_on=place) for r, place in zip(results, places, strict=True)]
    _, first, *_ = sentences(results, compare(results, reference="a=1", pairs=False, confidence=0.95))
    assert (first.kind, first.text) == (
        "open",
        "The trainings were made on different devices (2 on cpu 32-true, 1 on cuda bf16-mixed): a difference "
        "between arms may come of that.",
    )
    same = [replace(r, made_on="cpu 32-true") for r in results if r.right is not None]
    said = sentences(same, compare(same, reference="a=1", pairs=False, confidence=0.95))
    assert "devices" not in " ".join(s.text for s in said)


def test_nothing_is_left_to_compare():
    results = [failed("a=1", 0, "out of memory."), result("a=2", 0, [1, 0])]
    said = sentences(results, compare(results, reference="a=1", pairs=False, confidence=0.95))
    assert [s.text for s in said] == [
        "a=1 did not finish with its only seed: out of memory.",
        "There is nothing to compare.",
    ]


def test_arms_without_a_seed_in_common():
    results = [failed("a=1", 0), result("a=1", 1, [1, 0]), result("a=2", 0, [1, 0]), failed("a=2", 1)]
    said = sentences(results, compare(results, reference="a=1", pairs=False, confidence=0.95))
    assert said[-1].text == "a=2 cannot be compared with a=1: no seed finished with both."


LABELS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30)
POINTS = st.floats(-3, 3, allow_subnormal=False).map(lambda x: round(x, 3))
VALUES = st.integers(2, 6).flatmap(lambda n: st.tuples(*[st.lists(POINTS, min_size=n, max_size=n)] * 2))
BRACKETS = r"([\d.]+) points(?: of accuracy)? \[(-?[\d.]+), (-?[\d.]+)\]"


@given(LABELS, LABELS, VALUES)
def test_a_sentence_never_contradicts_its_intervals(arm, reference, values):
    both = accuracy, gap = [difference(*own, confidence=each_of(2, 0.9)) for own in values]
    text = verdict(replace(comparison(accuracy, gap), arm="ARM", reference="REFERENCE"))
    labelled = verdict(replace(comparison(accuracy, gap), arm=arm, reference=reference))
    assert labelled == re.sub("ARM|REFERENCE", lambda m: arm if m[0] == "ARM" else reference, text)
    claims = re.findall(
        rf"(gains|costs|lowers the generalisation gap by|raises the generalisation gap by) {BRACKETS}", text
    )
    doubts = re.findall(rf"its (?:gain|loss|difference|increase|reduction) [a-z ]+, {BRACKETS}", text)
    assert len(claims) == sum(d.is_clear for d in both)
    assert len(doubts) == sum(d.interval is not None and not d.is_clear for d in both)
    assert all(0 < float(low) <= float(value) <= float(high) for _, value, low, high in claims)
    assert all(float(low) <= 0 <= float(high) for _, low, high in doubts)
    for verb, d in (("gains", accuracy), ("raises", gap)):
        assert (f" {verb} " in text) == (d.is_clear and d.interval.low > 0)
    for verb, d in (("costs", accuracy), ("lowers", gap)):
        assert (f" {verb} " in text) == (d.is_clear and d.interval.high < 0)
    assert ("distinguishable from chance" in text) == bool(doubts)
    assert not re.search(r"nan|-0\.0+\b", text)


def losses(*by_seed: float) -> Difference:
    return Difference(by_seed, 1, 0.95, mean_interval(by_seed, 0.95))


def test_a_gap_in_loss_is_told_where_it_is_found_and_only_there():
    both = comparison(OPEN_UP, OPEN_DOWN)
    lower = replace(both, loss_gap=losses(-0.023, -0.022, -0.038, -0.028, -0.029))
    assert "; it lowers the gap in loss by 0.028 [0.020, 0.036]; on other images" in verdict(lower)
    assert lower.is_clear and not both.is_clear
    higher = replace(both, loss_gap=losses(0.0010, 0.0011, 0.0012, 0.0010, 0.0011))
    assert "; it raises the gap in loss by 0.00108 [0.00098, 0.00118]; " in verdict(higher)
    for unknown in (None, losses(0.1, -0.1, 0.2, -0.2, 0.0), losses(0.1), losses(0.1, 0.1)):
        assert "loss" not in verdict(replace(both, loss_gap=unknown)).replace("its loss in accuracy", "")


def test_gaps_in_loss_are_compared_where_all_are_known():
    def trained(arm: str, seed: int, loss_gap: float) -> Result:
        right = np.ones(50, dtype=bool)
        return Result(arm, seed, right, 1.0, 1.0, 0.1, 1.0, 0.0, 1, 10, gap=0.0, loss_gap=loss_gap)

    results = [trained("a", s, 0.10 + 0.01 * s) for s in range(3)]
    results += [trained("b", s, 0.05 + 0.011 * s) for s in range(3)]
    results += [trained("c", s, [0.1, float("nan"), 0.1][s]) for s in range(3)]
    b, c = compare(results, reference="a", pairs=False, confidence=0.95)
    assert c.loss_gap is None
    assert b.loss_gap is not None and b.loss_gap.value == pytest.approx(-0.049)
    assert b.loss_gap.statements == 1  # a family of its own: the others' intervals are no wider for it
    assert b.accuracy.statements == b.gap.statements == 4
