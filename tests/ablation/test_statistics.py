"""Intervals and tests against independent computations, known values, and what they promise in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.power import TTestPower

from cnn_tuning.statistics import (
    MOST_SEEDS,
    each_of,
    holm,
    mcnemar,
    mean_interval,
    mean_p,
    paired_accuracy_difference,
    seeds_to_settle,
)

SEEDS = st.lists(st.floats(-0.2, 0.2, allow_subnormal=False), min_size=2, max_size=8)


def near(rate: float, count: int) -> tuple[float, float]:
    """Return the bounds that a rate measured in so many trials stays within, but once in a thousand times."""
    low, high = binom.ppf([0.0005, 0.9995], count, rate)
    return low / count, high / count


def answers(won: int, lost: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return right answers of two classifiers; half of the other images are right for both."""
    a, b = (np.arange(count) % 2 == 0 for _ in range(2))
    a[:won], b[:won] = True, False
    a[won : won + lost], b[won : won + lost] = False, True
    return a, b


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (10, 0, 2 / 1024), (8, 2, 112 / 1024), (3, 3, 1), (1, 7, 18 / 256)],
)
def test_mcnemar_known_values(won, lost, p):
    assert mcnemar(won, lost) == pytest.approx(p)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_agrees_with_statsmodels_and_has_no_side(won, lost):
    table = [[10, won], [lost, 10]]
    assert mcnemar(won, lost) == pytest.approx(min(1.0, statsmodels_mcnemar(table, exact=True).pvalue))
    assert mcnemar(won, lost) == mcnemar(lost, won)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 300), st.sampled_from([0.8, 0.95, 0.999]))
def test_difference_over_images_has_no_side_and_holds_its_value(won, lost, others, confidence):
    count = max(1, won + lost + others)
    a, b = answers(won, lost, count)
    one, other = (paired_accuracy_difference(x, y, confidence) for x, y in ((a, b), (b, a)))
    assert one.value == pytest.approx((won - lost) / count)
    assert -1 <= one.low <= one.value <= one.high <= 1
    assert one.low < one.high
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


@pytest.mark.parametrize(("won", "lost", "count"), [(3, 1, 44), (20, 5, 1000), (60, 40, 10_000), (0, 4, 50)])
def test_difference_over_images_ends_where_the_score_test_does(won, lost, count):
    """The score statistic, with the likeliest nuisance share found numerically, is ±1.96 at both ends."""
    found = paired_accuracy_difference(*answers(won, lost, count), 0.95)

    def score(d: float) -> float:
        def unlikely(q: float) -> float:
            return -(won * np.log(q + d) + lost * np.log(q) + (count - won - lost) * np.log(1 - 2 * q - d))

        low, high = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-14}).x
        return (won - lost - count * d) / np.sqrt(count * (2 * q + d - d * d))

    z = norm.ppf(0.975)
    assert score(found.low) == pytest.approx(z, abs=1e-3)
    assert score(found.high) == pytest.approx(-z, abs=1e-3)


@pytest.mark.parametrize(
    ("only_a", "only_b", "count"), [(0.01, 0.002, 1000), (0.002, 0.001, 5000), (0.04, 0.04, 200)]
)
def test_difference_over_images_covers_as_stated(only_a, only_b, count):
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, [only_a, only_b, 1 - only_a - only_b], 4000)[:, :2]
    pairs, often = np.unique(drawn, axis=0, return_counts=True)
    found = [paired_accuracy_difference(*answers(won, lost, count), 0.95) for won, lost in pairs]
    inside = np.array([e.low <= only_a - only_b <= e.high for e in found])
    # Counts are discrete: exactly 95 % is out of reach, one point to either side is not.
    assert 0.935 < (inside * often).sum() / 4000 < 0.965


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_mean_over_seeds_covers_as_stated(seeds, confidence):
    rng = np.random.default_rng(seeds)
    found = [mean_interval(values, confidence) for values in rng.normal(0.3, 0.1, (4000, seeds))]
    low, high = near(confidence, 4000)
    assert low <= np.mean([e.low <= 0.3 <= e.high for e in found]) <= high


@given(SEEDS, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_interval_and_p_say_the_same_and_swap_with_the_sign(values, confidence):
    found, p = mean_interval(values, confidence), mean_p(values)
    assert (found is None) == (p is None)
    if found is None:
        assert np.ptp(values) < 1e-11
        return
    swapped = mean_interval([-x for x in values], confidence)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-found.value, -found.high, -found.low))
    reference = ttest_1samp(values, 0)
    assert p == pytest.approx(reference.pvalue)
    expected = reference.confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-12)
    if abs(p - (1 - confidence)) > 1e-6:
        assert (p < 1 - confidence) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize("values", [[], [0.1], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3], [0.99 - 0.98] * 5])
def test_without_spread_there_is_no_interval(values):
    assert mean_interval(values, 0.95) is None
    assert mean_p(values) is None
    assert seeds_to_settle(values, 0.95) is None


def test_corrections():
    assert each_of(1, 0.95) == pytest.approx(0.95)
    assert each_of(10, 0.95) == pytest.approx(0.995)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 6])
def test_seeds_to_settle_agree_with_statsmodels(effect, confidence):
    values = np.array([-1.0, 0.0, 1.0]) + effect
    exact = TTestPower().solve_power(effect_size=effect, alpha=1 - confidence, power=0.8)
    assert seeds_to_settle(values, confidence) == max(4, int(np.ceil(exact)))


def test_seeds_to_settle_find_the_effect_in_four_of_five_studies():
    values = np.array([-1.0, 0.0, 1.0]) + 1.2
    needed = seeds_to_settle(values, 0.99)
    studies = np.random.default_rng(0).normal(1.2, 1.0, (4000, needed))
    found = np.mean([mean_interval(study, 0.99).low > 0 for study in studies])
    assert 0.79 < found < 0.86  # the number is whole: rather more than too few


@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 6, 1 - 0.05 / 132])
@pytest.mark.parametrize("effect", [5.0, 10.0, 20.0, 40.0])
def test_seeds_to_settle_a_large_effect_are_few(effect, confidence):
    """Where scipy has no value for the power, as for some of these, that is not taken for none."""
    assert seeds_to_settle(np.array([-1.0, 1.0]) / np.sqrt(2) + effect, confidence) <= 8


def test_seeds_to_settle_nothing_are_too_many():
    assert seeds_to_settle([-1.0, 0.0, 1.01], 0.95) is None
    assert MOST_SEEDS == 1000
