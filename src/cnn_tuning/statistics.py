"""Uncertainty of comparisons: right answers of classifiers, or values over seeds, in; intervals, p values out.

Shares and differences are fractions, not percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_SEEDS = 1000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float


def mcnemar(won: int, lost: int) -> float:
    """Return the p value of McNemar's exact test: of `won` + `lost` images one classifier alone gets `won` right.

    Source: Q. McNemar, Psychometrika 12 (1947), in its exact binomial form: of the images that only one of
    the two gets right, each is right on half if they are equally good.
    """
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def paired_accuracy_difference(right_a: NDArray[Any], right_b: NDArray[Any], confidence: float) -> Estimate:
    """Return the accuracy of a minus that of b on the same images, with Tango's score interval.

    Source: T. Tango, Statistics in Medicine 17 (1998) 891-908. It keeps its confidence where the two differ
    on few images, as good classifiers do; the Wald interval does not.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"two answers an image are needed, got {a.shape} and {b.shape}")
    count, won, lost = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    value, z = (won - lost) / count, float(norm.ppf((1 + confidence) / 2))

    def score(difference: float) -> float:
        # The share of images that only b gets right, most likely under this difference.
        linear = (2 * count - won + lost) * difference - won - lost
        rest = lost * difference * (1 - difference)
        share = (math.sqrt(max(0.0, linear**2 + 8 * count * rest)) - linear) / (4 * count)
        variance = count * (2 * share + difference * (1 - difference))
        return (won - lost - count * difference) / math.sqrt(variance) if variance > 0 else 0.0

    edge = 1 - 1e-12
    low = brentq(lambda d: score(d) - z, -edge, value) if value > -edge else -1.0
    high = brentq(lambda d: score(d) + z, value, edge) if value < edge else 1.0
    return Estimate(value, float(low), float(high))


def share_interval(hits: int, count: int, confidence: float) -> Estimate:
    """Return a share with its score interval (E. B. Wilson, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    return Estimate(hits / count, float(interval.low), float(interval.high))


def has_spread(values: Sequence[float]) -> bool:
    """Return whether there are several values, not all the same up to rounding: a t interval needs that."""
    return len(values) > 1 and float(np.ptp(values)) > _ROUNDING


def mean_interval(values: Sequence[float], confidence: float) -> Estimate | None:
    """Return the mean over seeds with its t interval; None where the values have no spread.

    Of differences between two arms with the same seeds, it is the paired t interval (Student 1908).
    """
    if not has_spread(values):
        return None
    value, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    low, high = _t_interval(confidence, len(values) - 1)
    return Estimate(value, value + low * error, value + high * error)


def ratio_interval(above: Sequence[float], below: Sequence[float], confidence: float) -> Estimate | None:
    """Return mean(above) / mean(below) of pairs with its interval; None where the interval has no two ends.

    Source: E. C. Fieller, Journal of the Royal Statistical Society B 16 (1954) 175-185. It has two ends only if
    the mean of `below` is told apart from zero at this confidence.
    """
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if not has_spread(below):
        return None
    x, y, squared = float(a.mean()), float(b.mean()), _t_interval(confidence, len(b) - 1)[1] ** 2 / len(b)
    (xx, xy), (_, yy) = np.cov(a, b) * squared
    bottom = y**2 - yy
    if bottom <= 0:
        return None
    middle = x * y - xy
    reach = math.sqrt(max(0.0, middle**2 - bottom * (x**2 - xx)))
    return Estimate(x / y, float((middle - reach) / bottom), float((middle + reach) / bottom))


@cache
def _t_interval(confidence: float, degrees: int) -> tuple[float, float]:
    from scipy.stats import t

    low, high = t.interval(confidence, degrees)
    return float(low), float(high)


def mean_p(values: Sequence[float]) -> float | None:
    """Return the two-sided p value of the t test that the mean is zero; it is the dual of `mean_interval`."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, 0.0).pvalue) if has_spread(values) else None


def each_of(statements: int, confidence: float) -> float:
    """Return the confidence that each of so many intervals needs for all of them to hold together (Bonferroni)."""
    return 1 - (1 - confidence) / max(1, statements)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's step-down method (S. Holm, 1979)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if len(p_values) else []


def seeds_to_settle(values: Sequence[float], confidence: float, power: float = 0.8) -> int | None:
    """Return with how many seeds an effect as large as observed would be found; None for over MOST_SEEDS."""
    from statsmodels.stats.power import TTestPower

    if not has_spread(values):
        return None
    effect = abs(float(np.mean(values))) / float(np.std(values, ddof=1))
    seeds = np.arange(len(values) + 1, MOST_SEEDS + 1)
    # One tail of the two-sided test: the other one is nothing here, and scipy often has no value for it.
    powers = TTestPower().power(effect, seeds, (1 - confidence) / 2, alternative="larger")
    enough = np.flatnonzero(powers >= power)
    return int(seeds[enough[0]]) if len(enough) else None
