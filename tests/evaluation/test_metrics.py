"""Metrics and their intervals against independent implementations and known truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from cnn_tuning.config import EvaluationConfig
from cnn_tuning.evaluation.metrics import measure
from cnn_tuning.evaluation.outcome import confident_mistakes

QUICK = EvaluationConfig("test", bootstrap_samples=200)
CLASSES = tuple("abcd")


def answers(seed: int, count: int, sharp: float = 1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    logits = rng.normal(size=(count, 4))
    logits[np.arange(count), labels] += sharp
    shares = np.exp(logits)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32), labels


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(30, 400))
def test_figures_agree_with_scikit_learn(seed, count):
    probabilities, labels = answers(seed, count)
    metrics = measure(probabilities, labels, CLASSES, QUICK, seed)
    predicted = probabilities.argmax(1)
    assert metrics.accuracy.value == pytest.approx((predicted == labels).mean())
    assert (metrics.confusion == confusion_matrix(labels, predicted, labels=range(4))).all()
    present = sorted({*labels, *predicted})
    assert metrics.macro_f1.value == pytest.approx(f1_score(labels, predicted, labels=present, average="macro"))
    assert metrics.log_loss.value == pytest.approx(log_loss(labels, probabilities, labels=range(4)), rel=1e-5)
    for name in ("accuracy", "macro_f1", "log_loss", "calibration_error"):
        estimate = getattr(metrics, name)
        assert estimate.low <= estimate.value <= estimate.high


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's score interval by its formula."""
    share, shrink = hits / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / shrink
    return centre - half, centre + half


def test_shares_have_wilson_intervals():
    probabilities, labels = answers(0, 250)
    metrics = measure(probabilities, labels, CLASSES, QUICK, 0)
    hits = int((probabilities.argmax(1) == labels).sum())
    assert (metrics.accuracy.low, metrics.accuracy.high) == pytest.approx(wilson(hits, 250))
    assert metrics.accuracy.high < 1


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    probabilities, labels = answers(1, 200_000)
    truth = measure(probabilities, labels, CLASSES, EvaluationConfig("t", bootstrap_samples=100), 0)
    covered = dict.fromkeys(("accuracy", "log_loss"), 0)
    for seed in range(60):
        probabilities, labels = answers(seed + 10, 300)
        estimates = measure(probabilities, labels, CLASSES, QUICK, seed)
        for metric in covered:
            estimate = getattr(estimates, metric)
            covered[metric] += estimate.low <= getattr(truth, metric).value <= estimate.high
    # 95 % of 60 is 57; 50 or fewer would happen less than once in a thousand times.
    assert min(covered.values()) > 50, covered


def test_the_same_seed_gives_the_same_intervals():
    probabilities, labels = answers(3, 200)
    one, two = (measure(probabilities, labels, CLASSES, QUICK, 5) for _ in range(2))
    assert one.flat("test") == two.flat("test")


def test_a_class_without_images_or_answers_has_no_figure():
    probabilities, labels = answers(4, 100)
    keep = labels != 3
    probabilities[:, 2] = 0
    metrics = measure(probabilities[keep], labels[keep], CLASSES, QUICK, 0)
    assert metrics.recall["d"] is None
    assert metrics.precision["c"] is None
    assert metrics.recall["a"] is not None


def test_calibration_error_is_near_zero_for_honest_and_large_for_boastful_answers():
    rng = np.random.default_rng(0)
    stated = rng.uniform(0.5, 1, 20_000)
    honest = np.stack([stated, 1 - stated], 1).astype(np.float32)
    labels = (rng.uniform(size=20_000) > stated).astype(int)
    assert measure(honest, labels, ("a", "b"), QUICK, 0).calibration_error.value < 0.02
    boastful = np.tile(np.array([[0.99, 0.01]], np.float32), (20_000, 1))
    assert measure(boastful, labels, ("a", "b"), QUICK, 0).calibration_error.value > 0.2


def test_mistakes_come_most_confident_first():
    probabilities, labels = answers(5, 300, sharp=0.5)
    shown = confident_mistakes(labels, probabilities, 10)
    assert (probabilities[shown].argmax(1) != labels[shown]).all()
    confidence = probabilities[shown].max(1)
    assert (np.diff(confidence) <= 0).all()
    wrong = probabilities.argmax(1) != labels
    assert confidence[0] == probabilities[wrong].max()
