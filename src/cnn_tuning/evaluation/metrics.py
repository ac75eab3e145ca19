"""Metrics on one split, each with its interval: probabilities and labels in, `Metrics` out.

Shares (accuracy, recall, precision) have Wilson score intervals (Wilson 1927); log-loss, macro F1 and
calibration error have percentile bootstrap intervals over images (Efron 1979), seeded. The binned calibration
error is biased upwards where bins hold few images (Kumar et al. 2019), and so is its interval, which is made
to hold the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.config import EvaluationConfig
from cnn_tuning.statistics import Estimate, share_interval

SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Metrics:
    """What a classifier did on a split of `count` images.

    `confusion[i][j]`: images of class i taken for class j. `calibration`: a row a bin with images in it
    (mean confidence, share right, count). Recall is None for a class without images, precision for a
    class that was never predicted.
    """

    count: int
    confidence: float
    accuracy: Estimate
    macro_f1: Estimate
    log_loss: Estimate
    calibration_error: Estimate
    recall: dict[str, Estimate | None]
    precision: dict[str, Estimate | None]
    confusion: NDArray[np.int64]
    calibration: list[tuple[float, Estimate, int]]

    def flat(self, split: str) -> dict[str, float]:
        """Return the headline figures as `split/name`, their bounds as `…_low` and `…_high`."""
        figures: dict[str, float] = {}
        for name in ("accuracy", "macro_f1", "log_loss", "calibration_error"):
            estimate: Estimate = getattr(self, name)
            figures |= {
                f"{split}/{name}": estimate.value,
                f"{split}/{name}_low": estimate.low,
                f"{split}/{name}_high": estimate.high,
            }
        return figures


def measure(
    probabilities: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    config: EvaluationConfig,
    seed: int,
) -> Metrics:
    """Return all metrics of `probabilities` (N×K, rows sum to 1) against `labels` (N, 0 … K-1)."""
    predicted = probabilities.argmax(1)
    confident = probabilities.max(1).astype(np.float64)
    right = predicted == labels
    k = len(classes)
    confusion = np.bincount(labels * k + predicted, minlength=k * k).reshape(k, k)
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    losses = -np.log(np.maximum(own, SMALLEST_PROBABILITY))
    bins = np.minimum((confident * config.calibration_bins).astype(int), config.calibration_bins - 1)

    def bootstrapped(statistic: Callable[[NDArray[np.int64]], float]) -> Estimate:
        return _bootstrap(len(labels), statistic, config, seed)

    def f1_of(rows: NDArray[np.int64]) -> float:
        cells = np.bincount(labels[rows] * k + predicted[rows], minlength=k * k).reshape(k, k)
        return _macro_f1(cells)

    def calibration_of(rows: NDArray[np.int64]) -> float:
        gap = confident[rows] - right[rows]
        return float(np.abs(np.bincount(bins[rows], gap)).sum() / len(rows))

    return Metrics(
        count=len(labels),
        confidence=config.confidence,
        accuracy=share_interval(int(right.sum()), len(labels), config.confidence),
        macro_f1=bootstrapped(f1_of),
        log_loss=bootstrapped(lambda rows: float(losses[rows].mean())),
        calibration_error=bootstrapped(calibration_of),
        recall=_shares(classes, confusion.diagonal(), confusion.sum(1), config.confidence),
        precision=_shares(classes, confusion.diagonal(), confusion.sum(0), config.confidence),
        confusion=confusion,
        calibration=[
            (float(confident[bins == b].mean()), share_interval(int(hits), int(n), config.confidence), int(n))
            for b, (hits, n) in enumerate(zip(np.bincount(bins, right), np.bincount(bins), strict=True))
            if n
        ],
    )


def _shares(
    classes: Sequence[str], hits: NDArray[Any], counts: NDArray[Any], confidence: float
) -> dict[str, Estimate | None]:
    return {
        name: share_interval(int(h), int(n), confidence) if n else None
        for name, h, n in zip(classes, hits, counts, strict=True)
    }


def _macro_f1(confusion: NDArray[np.int64]) -> float:
    """Return the mean F1 over classes that occur or were predicted."""
    hits, total = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return float((2 * hits[total > 0] / total[total > 0]).mean())


def _bootstrap(
    count: int, statistic: Callable[[NDArray[np.int64]], float], config: EvaluationConfig, seed: int
) -> Estimate:
    from scipy.stats import bootstrap

    rows = np.arange(count)
    if count < 2:
        value = statistic(rows)
        return Estimate(value, value, value)
    interval = bootstrap(
        (rows,),
        statistic,
        vectorized=False,
        n_resamples=config.bootstrap_samples,
        confidence_level=config.confidence,
        method="percentile",
        batch=1,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    value = statistic(rows)
    return Estimate(value, min(value, float(interval.low)), max(value, float(interval.high)))
