"""The gate: two models' predictions on the same test images in, promoted or not and why out.

A predictions file is CSV in UTF-8. Its first line is `# test_split=DIGEST` (the digest of the test split, any
text without white space), its second `index,label,predicted,probability`; then one line an image: its place in
the test split, true and predicted class index, and the probability of the predicted class in [0, 1].
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cnn_tuning.errors import UserError
from cnn_tuning.statistics import mcnemar

COLUMNS = ("index", "label", "predicted", "probability")
MARK = "# test_split="
BY_HAND = "`cnn-tuning promote models:/NAME/VERSION` moves the alias by hand"
PREDICTIONS = "registry/predictions.csv"  # its place among the artifacts of a version's run


@dataclass(frozen=True)
class Gate:
    """What a challenger must show: p below `significance` and at least `minimum_gain` in accuracy.

    `barred`: why none may pass, whatever it shows (empty: it may).
    """

    significance: float
    minimum_gain: float
    barred: str = ""


@dataclass(frozen=True)
class Predictions:
    """One model's answers on a test split: image index -> (label, predicted)."""

    test_split: str
    answers: dict[int, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """Return the fraction of right answers."""
        return sum(label == predicted for label, predicted in self.answers.values()) / len(self.answers)


@dataclass(frozen=True)
class Verdict:
    """The gate's answer, with the sentence that is kept with the model version."""

    promoted: bool
    reason: str


def write_predictions(path: Path, test_split: str, rows: Iterable[tuple[int, int, int, float]]) -> None:
    """Write (index, label, predicted, probability) rows as a predictions file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"{MARK}{test_split}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((i, label, predicted, f"{p:.6f}") for i, label, predicted, p in rows)


def read_predictions(path: Path) -> Predictions:
    """Read a predictions file.

    Raises:
        UserError: names the line that is not as the format says.
    """
    with path.open(newline="", encoding="utf-8") as file:
        mark, header = file.readline().strip(), file.readline().strip()
        if not mark.startswith(MARK) or header != ",".join(COLUMNS):
            raise UserError(f"{path}:1: a predictions file starts with '{MARK}DIGEST' and '{','.join(COLUMNS)}'")
        answers = {}
        for number, row in enumerate(csv.reader(file), start=3):
            try:
                index, label, predicted, _ = row
                answers[int(index)] = (int(label), int(predicted))
            except ValueError:
                raise UserError(f"{path}:{number}: expected {','.join(COLUMNS)}, found {','.join(row)}") from None
    if not answers:
        raise UserError(f"{path}: holds no predictions")
    return Predictions(mark.removeprefix(MARK), answers)


def decide(challenger: Predictions, champion: Predictions, version: str, gate: Gate) -> Verdict:
    """Compare a challenger with the champion (`version`) by McNemar's exact test on the same images."""
    if challenger.test_split != champion.test_split:
        return Verdict(
            False,
            f"not promoted: measured on another test split than version {version} "
            f"({challenger.test_split[:12]} against {champion.test_split[:12]}); {BY_HAND}",
        )
    truth = {i: label for i, (label, _) in challenger.answers.items()}
    if truth != {i: label for i, (label, _) in champion.answers.items()}:
        return Verdict(False, f"not promoted: its test images or labels differ from those of version {version}")
    right = {i for i, (label, predicted) in challenger.answers.items() if label == predicted}
    before = {i for i, (label, predicted) in champion.answers.items() if label == predicted}
    won, lost = len(right - before), len(before - right)
    p = mcnemar(won, lost)
    gain = (won - lost) / len(truth)
    figures = (
        f"{challenger.accuracy:.2%} against {champion.accuracy:.2%} of version {version} on the same "
        f"{len(truth)} test images ({won} won, {lost} lost, exact McNemar p = {p:.2g})"
    )
    if gain <= 0:
        return Verdict(False, f"not promoted: {figures}: no gain")
    if gain < gate.minimum_gain:
        return Verdict(False, f"not promoted: {figures}: gains less than {gate.minimum_gain:.2%}")
    if p >= gate.significance:
        return Verdict(False, f"not promoted: {figures}: not significant at {gate.significance:g}")
    return Verdict(True, f"promoted: {figures}")
