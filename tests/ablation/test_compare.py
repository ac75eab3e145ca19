"""Comparisons of arms: what is there is found, what is not is not, and intervals hold what they promise."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from ablation_studies import failed, result, study
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from cnn_tuning.ablation.compare import compare
from cnn_tuning.statistics import mcnemar

STUDIES = 1500
FOUR = ("none", "conv", "dense", "both")


@pytest.fixture(scope="module", autouse=True)
def _no_collection():
    """statsmodels collects all garbage for each Holm correction; thousands of studies would wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


def against_first(results):
    return compare(results, reference=results[0].arm, pairs=False, confidence=0.95)


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), pytest.param(4, 5, marks=pytest.mark.slow)])
def test_without_an_effect_one_study_in_twenty_claims_one(arms, seeds):
    rng = np.random.default_rng(7)
    studies = (study(rng, dict.fromkeys(FOUR[:arms], 0.0), seeds=seeds) for _ in range(STUDIES))
    compared = [against_first(results) for results in studies]
    claims = np.array([[[c.accuracy.is_clear, c.gap.is_clear] for c in found] for found in compared])
    # The verdicts of a study as a whole. Bonferroni: at most 5 %, and not much less.
    whole = claims.any((1, 2)).sum()
    assert whole <= binom.ppf(0.999, STUDIES, 0.05)
    assert whole >= binom.ppf(0.001, STUDIES, 0.035)
    # A single statement about accuracy errs exactly as often as its level says: neither more nor less.
    alone = claims[:, 0, 0].sum()
    low, high = binom.ppf([0.001, 0.999], STUDIES, 0.05 / (2 * (arms - 1)))
    assert low <= alone <= high


@pytest.mark.slow
def test_without_an_effect_the_test_over_images_claims_one_in_twenty_at_most():
    rng = np.random.default_rng(1)
    studies = [against_first(study(rng, dict.fromkeys(FOUR, 0.0), seeds=1, seed_noise=0)) for _ in range(1000)]
    false = sum(any(c.images.p < 0.05 for c in compared) for compared in studies)
    # Exact tests of counts are conservative: below 5 %, but not without a claim.
    assert binom.ppf(0.001, 1000, 0.01) <= false <= binom.ppf(0.999, 1000, 0.05)
    alone = sum(mcnemar(compared[0].images.won, compared[0].images.lost) < 0.05 for compared in studies)
    assert binom.ppf(0.001, 1000, 0.03) <= alone <= binom.ppf(0.999, 1000, 0.05)


def test_a_planted_effect_is_found_and_no_other():
    rng = np.random.default_rng(2)
    effects, overfit = {"none": 0.0, "conv": 0.0, "both": 1.5}, {"both": -0.05}
    gains, falls, others = [], [], []
    for _ in range(200):
        conv, both = against_first(study(rng, effects, overfit=overfit))
        gains.append(both.accuracy.is_clear and both.accuracy.interval.low > 0)
        falls.append(both.gap.is_clear and both.gap.interval.high < 0)
        others.append(conv.accuracy.is_clear or conv.gap.is_clear)
        assert both.images.won > both.images.lost
    assert np.mean(gains) > 0.95
    assert np.mean(falls) > 0.95
    assert np.mean(others) < 0.08


@pytest.mark.slow
def test_all_intervals_of_a_question_hold_the_truth_together():
    """Arms that do differ; the truth about each is its mean over very many trainings on the same images."""
    effects = {"none": 0.0, "conv": 0.4, "both": -0.6}

    def draw(seeds: int, rng: np.random.Generator):
        difficulty = np.random.default_rng(99).normal(2.0, 1.5, 300)
        shifts = np.array(list(effects.values()))[:, None] + rng.normal(0, 0.15, (3, seeds))
        return rng.random((3, seeds, 300)) < 1 / (1 + np.exp(-difficulty - shifts[..., None]))

    means = draw(10_000, np.random.default_rng(3)).mean((1, 2))
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(1000):
        right, train = draw(5, rng), rng.normal(0.97, 0.01, (3, 5))
        results = [result(arm, s, right[i, s], train[i, s]) for i, arm in enumerate(effects) for s in range(5)]
        held += all(
            c.accuracy.interval.low <= means[i] - means[0] <= c.accuracy.interval.high
            and c.gap.interval.low <= means[0] - means[i] <= c.gap.interval.high
            for i, c in enumerate(against_first(results), start=1)
        )
    assert binom.ppf(0.001, 1000, 0.95) <= held <= binom.ppf(0.999, 1000, 0.975)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4))
def test_swapped_arms_give_the_same_with_the_other_sign(seed, seeds, arms):
    results = study(np.random.default_rng(seed), {f"a={i}": 0.3 * i for i in range(arms)}, seeds=seeds, images=40)
    forth = compare(results, reference="", pairs=True, confidence=0.9)
    back = {(c.reference, c.arm): c for c in compare(results[::-1], reference="", pairs=True, confidence=0.9)}
    assert len(forth) == arms * (arms - 1) / 2
    for one in forth:
        other = back[one.arm, one.reference]
        assert (one.images.won, one.images.lost, one.images.p) == (
            other.images.lost,
            other.images.won,
            other.images.p,
        )
        for mine, its in ((one.accuracy, other.accuracy), (one.gap, other.gap)):
            assert mine.value == pytest.approx(-its.value, abs=1e-12)
            assert (mine.interval is None) == (its.interval is None)
            if mine.interval:
                assert (mine.interval.low, mine.interval.high) == pytest.approx(
                    (-its.interval.high, -its.interval.low)
                )
                assert mine.interval.low <= mine.value <= mine.interval.high
                assert mine.p == pytest.approx(its.p)
                if abs(mine.p - 0.1) > 1e-6:
                    assert (mine.p < 0.1) == mine.is_clear


def test_one_seed_is_mcnemars_test_and_has_no_interval():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 200)) < 0.7
    (c,) = against_first([result("a", 0, a), result("b", 0, b)])
    won, lost = int((b & ~a).sum()), int((a & ~b).sum())
    assert (c.images.won, c.images.lost) == (won, lost)
    assert c.images.p == pytest.approx(mcnemar(won, lost))
    assert c.accuracy.interval is None
    assert c.accuracy.value == pytest.approx(b.mean() - a.mean())
    assert not c.accuracy.is_clear


def test_with_several_seeds_an_image_is_won_by_more_right_answers():
    a = [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
    b = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    results = [result("a", s, x) for s, x in enumerate(a)] + [result("b", s, x) for s, x in enumerate(b)]
    (c,) = against_first(results)
    assert (c.images.won, c.images.lost) == (3, 1)


def test_arms_are_compared_over_the_seeds_that_both_finished():
    rng = np.random.default_rng(5)
    whole = study(rng, {"a": 0.0, "b": 0.2, "c": 0.0}, seeds=4)
    results = [
        failed(r.arm, r.seed) if (r.arm, r.seed) in {("b", 1), ("a", 3)} or r.arm == "c" else r for r in whole
    ]
    b, c = against_first(results)
    accuracy = {(r.arm, r.seed): r.val_accuracy for r in whole}
    assert b.seeds == (0, 2)
    assert b.accuracy.by_seed == pytest.approx([accuracy["b", s] - accuracy["a", s] for s in (0, 2)])
    assert (b.planned, c.seeds) == (4, ())
    # What could not be compared is not corrected for.
    assert b.accuracy.confidence == pytest.approx(0.975)
    assert c.images.p == 1


def test_an_interval_stays_within_what_is_possible():
    results = [result("a", s, [1] * 50) for s in range(2)] + [result("b", s, [s] * 50) for s in range(2)]
    (c,) = against_first(results)
    assert (c.accuracy.interval.low, c.accuracy.interval.high) == (-1, 1)
    assert not c.accuracy.is_clear
