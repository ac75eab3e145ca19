"""Baseline against tuned on the same images: the sentence follows the test, and never the wrong way round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.evaluation.comparison import compare


def answers(won, lost, both=50, neither=10):
    """Return labels and two models' answers with so many images that only one gets right."""
    labels = np.zeros(won + lost + both + neither, np.int64)
    ours, theirs = np.ones_like(labels), np.ones_like(labels)
    ours[:won] = 0
    theirs[won : won + lost] = 0
    ours[won + lost : won + lost + both] = theirs[won + lost : won + lost + both] = 0
    return ours, theirs, labels


def test_a_clear_gain_and_a_clear_loss_are_named():
    ours, theirs, labels = answers(30, 5)
    found = compare(ours, theirs, labels, 0.95)
    assert found.gain.value == pytest.approx(25 / 95)
    assert found.gain.low > 0
    assert found.sentence("tuned", "baseline").startswith(
        "tuned is better than baseline on the test split by 26.32 points"
    )
    back = compare(theirs, ours, labels, 0.95)
    assert back.sentence("tuned", "baseline").startswith("tuned is worse than baseline")


def test_chance_is_called_chance():
    assert "cannot be told apart" in compare(*answers(4, 3), 0.95).sentence("tuned", "baseline")
    same = compare(*answers(0, 0), 0.95)
    assert same.p == 1
    assert "no points more or fewer" in same.sentence("tuned", "baseline")


@given(won=st.integers(0, 40), lost=st.integers(0, 40), both=st.integers(0, 200), neither=st.integers(1, 20))
def test_swapping_the_models_mirrors_the_figures(won, lost, both, neither):
    ours, theirs, labels = answers(won, lost, both, neither)
    one, two = compare(ours, theirs, labels, 0.95), compare(theirs, ours, labels, 0.95)
    assert one.gain.value == pytest.approx(-two.gain.value)
    assert one.gain.low == pytest.approx(-two.gain.high, abs=1e-9)
    assert one.p == two.p
    assert one.gain.low <= one.gain.value <= one.gain.high
    assert ("better" in one.sentence("a", "b")) == ("worse" in two.sentence("a", "b"))
