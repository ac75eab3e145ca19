"""The most confident wrong answers: a model's folder and its answers come in, pictures with heat go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.data.packed import PackedSplit
from cnn_tuning.evaluation.outcome import confident_mistakes
from cnn_tuning.reports.plots import as_colours, overlay, short


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: `picture` and, where there is one, the same with heat for the answer (H×W×3); names."""

    index: int
    picture: NDArray[np.uint8]
    heat: NDArray[np.uint8] | None
    true: str
    answer: str
    probability: float

    @property
    def caption(self) -> str:
        """Return what was answered and what it is, as it fits over a small picture."""
        return f"{short(self.answer, 12)} ({self.probability:.0%}), is {short(self.true, 12)}"

    @property
    def pictures(self) -> list[NDArray[np.uint8]]:
        """Return the picture, and the one with heat where there is one."""
        return [self.picture] if self.heat is None else [self.picture, self.heat]


def find_mistakes(
    bundle: Path, split: PackedSplit, probabilities: NDArray[np.float32], classes: Sequence[str], most: int
) -> list[Mistake]:
    """Return the wrong answers of the model in `bundle`, the most confident first."""
    from cnn_tuning.evaluation.explanation import heat_maps
    from cnn_tuning.models import bundle as bundles

    shown = confident_mistakes(split.labels, probabilities, most)
    images, answers = np.array(split.images[shown]), probabilities[shown].argmax(1)
    maps = heat_maps(bundles.load(bundle)[0], images, answers)
    return [
        Mistake(
            index=int(row),
            picture=as_colours(images[i]),
            heat=None if maps is None else overlay(images[i], maps[i]),
            true=classes[split.labels[row]],
            answer=classes[answers[i]],
            probability=float(probabilities[row].max()),
        )
        for i, row in enumerate(shown)
    ]
