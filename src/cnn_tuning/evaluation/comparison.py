"""Two models' answers to the same images come in; which is better, by how much and how sure, goes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.statistics import Estimate, mcnemar, paired_accuracy_difference


@dataclass(frozen=True)
class Comparison:
    """What a challenger gains in accuracy over a reference on `count` images, with Tango's interval.

    `won`: images that only the challenger answers rightly, `lost`: only the reference. `p`: exact McNemar.
    """

    count: int
    confidence: float
    gain: Estimate
    won: int
    lost: int
    p: float

    def flat(self) -> dict[str, float]:
        """Return the figures by name."""
        return {
            "gain": self.gain.value,
            "gain_low": self.gain.low,
            "gain_high": self.gain.high,
            "won": self.won,
            "lost": self.lost,
            "mcnemar_p": self.p,
        }

    def sentence(self, challenger: str, reference: str) -> str:
        """Return the verdict in one sentence; points are hundredths of accuracy."""
        points = f"{100 * abs(self.gain.value):.2f} points"
        interval = f"{100 * self.confidence:g} % interval [{100 * self.gain.low:.2f}, {100 * self.gain.high:.2f}]"
        figures = (
            f"{interval}; of {self.count:,} images {self.won} won, {self.lost} lost; McNemar p = {self.p:.2g}"
        )
        if self.p >= 1 - self.confidence:
            sign = "more" if self.gain.value > 0 else "fewer"
            what = f"{points} {sign}" if self.won != self.lost else "no points more or fewer"
            return f"{challenger} cannot be told apart from {reference} on the test split: {what} ({figures})"
        better = "better" if self.gain.value > 0 else "worse"
        return f"{challenger} is {better} than {reference} on the test split by {points} ({figures})"


def compare(
    challenger: NDArray[np.int64], reference: NDArray[np.int64], labels: NDArray[np.int64], confidence: float
) -> Comparison:
    """Compare two models' answers (class indices) with the labels of the same images."""
    ours, theirs = challenger == labels, reference == labels
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    gain = paired_accuracy_difference(ours, theirs, confidence)
    return Comparison(len(labels), confidence, gain, won, lost, mcnemar(won, lost))
