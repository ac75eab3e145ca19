"""What `evaluate` writes besides plots: answers and tables, as CSV for people and DVC."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.evaluation.metrics import Metrics


def tree_of(figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return `split/name` figures nested by split, as `dvc metrics` shows them."""
    tree: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        part, _, metric = name.partition("/")
        tree.setdefault(part, {})[metric] = value
    return tree


def write_tables(folder: Path, metrics: Metrics, classes: Sequence[str]) -> None:
    """Write `classes.csv` and `calibration.csv`."""
    _write(folder / "classes.csv", ["class", "images", *_BOUNDS["recall"], *_BOUNDS["precision"]], [
        [name, int(metrics.confusion[i].sum()), *_row(metrics.recall[name]), *_row(metrics.precision[name])]
        for i, name in enumerate(classes)
    ])  # fmt: skip
    _write(folder / "calibration.csv", ["confidence", "accuracy", "low", "high", "images"], [
        [confidence, *_row(share), count] for confidence, share, count in metrics.calibration
    ])  # fmt: skip


def write_answers(
    path: Path, labels: NDArray[np.int64], probabilities: NDArray[np.float32], classes: Sequence[str]
) -> None:
    """Write the class and the answer of each image by name: what `dvc plots` draws a confusion matrix of."""
    answers = zip(labels, probabilities.argmax(1), strict=True)
    _write(path, ["class", "answer"], ([classes[label], classes[answer]] for label, answer in answers))


def confident_mistakes(
    labels: NDArray[np.int64], probabilities: NDArray[np.float32], most: int
) -> NDArray[np.int64]:
    """Return the positions of wrong answers, the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]


_BOUNDS = {name: [name, f"{name}_low", f"{name}_high"] for name in ("recall", "precision")}


def _row(estimate: Any) -> list[Any]:
    return [estimate.value, estimate.low, estimate.high] if estimate else ["", "", ""]


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
