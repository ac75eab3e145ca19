"""What an ablation leaves: the results of one question come in, files and an `Outcome` go out.

Files: `runs.csv`, `arms.csv`, `comparisons.csv`, `verdicts.txt`, and pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnn_tuning.ablation.compare import Comparison, Result, by_arm, compare
from cnn_tuning.ablation.pictures import draw
from cnn_tuning.ablation.tables import (
    Arm,
    arms_table,
    comparisons_table,
    summarise,
    usd_more,
    usd_per_point,
    write_tables,
)
from cnn_tuning.ablation.verdict import sentences
from cnn_tuning.config import QuestionConfig
from cnn_tuning.reports.ablation import Section
from cnn_tuning.reports.scales import dollars

__all__ = ["Outcome", "Result", "write_outcome"]

PER_POINT = (
    "$ per point: what a training costs more than the reference's, for each point of validation accuracy that it "
    "gains, with Fieller's interval over seeds (each alone); none where chance is not ruled out for the gain. "
    "Saved: of an arm that loses, what it saves for each point lost."
)
ARM_METRICS = ("val_accuracy", "val_accuracy_std", "gap", "gap_std", "loss_gap", "seconds", "usd", "failed")


@dataclass(frozen=True)
class Outcome:
    """What one question came to; `page` is its part of the report."""

    name: str
    reference: str
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    verdicts: tuple[str, ...]
    page: Section
    costs: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Return what is known as `question/arm/figure`, in characters that MLflow takes."""
        keys = _keys([arm.arm for arm in self.arms])
        found: dict[str, float] = {}
        for arm in self.arms:
            found |= {f"{keys[arm.arm]}/{name}": float(getattr(arm, name)) for name in ARM_METRICS}
        for c in self.comparisons:
            start = f"{keys[c.arm]} against {keys[c.reference]}"
            for name, d in (("accuracy", c.accuracy), ("gap", c.gap), ("loss_gap", c.loss_gap)):
                if d is None:
                    continue
                found[f"{start}/{name}_difference"] = d.value
                if d.interval:
                    found[f"{start}/{name}_difference_low"] = d.interval.low
                    found[f"{start}/{name}_difference_high"] = d.interval.high
            if c.seeds:
                found[f"{start}/mcnemar_p"] = c.images.p
            if c.usd_per_point:
                found[f"{start}/usd_per_point"] = c.usd_per_point.value
                found[f"{start}/usd_per_point_low"] = c.usd_per_point.low
                found[f"{start}/usd_per_point_high"] = c.usd_per_point.high
        return {f"{self.name}/{name}": value for name, value in found.items() if math.isfinite(value)}


def write_outcome(
    folder: Path, name: str, question: QuestionConfig, results: Sequence[Result], confidence: float
) -> Outcome:
    """Compare the arms and write all about them into `folder`; without a reference named, it is the first arm."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = question.reference or results[0].arm
    pairs = question.compare == "pairs"
    comparisons = compare(results, reference=reference, pairs=pairs, confidence=confidence)
    arms = [summarise(arm, own) for arm, own in by_arm(results).items()]
    in_parts = "trainer.sequential_parts" in {**question.factors, **question.settings}
    verdicts = sentences(results, comparisons, in_parts=in_parts)
    write_tables(folder, results, arms, comparisons)
    (folder / "verdicts.txt").write_text("".join(f"{said.text}\n" for said in verdicts), encoding="utf-8")
    page = Section(
        name=name,
        question=question.question,
        verdicts=[(said.kind, said.text) for said in verdicts],
        arms=arms_table(arms, "" if pairs else reference),
        comparisons=comparisons_table(comparisons),
        note=_note(comparisons, confidence),
        pictures=draw(folder, question, results, arms, comparisons, confidence),
    )
    texts = tuple(said.text for said in verdicts)
    return Outcome(
        name, reference, tuple(arms), tuple(comparisons), texts, page, tuple(_costs(results, comparisons))
    )


def _note(comparisons: Sequence[Comparison], confidence: float) -> str:
    """Say what the figures of the comparisons hold together with."""
    images = (
        "Accuracy is of the best epochs, the gaps of the last. Intervals of the gap in loss hold together among "
        "themselves; p values of McNemar's test are corrected for their number. Bold: chance is ruled out."
    )
    given = [d for c in comparisons for d in (c.accuracy, c.gap) if d.interval]
    if not given:
        return f"Without a spread over seeds there is no interval. {images}"
    paid = any(any(c.usd) for c in comparisons)
    return (
        f"The {given[0].statements} intervals over seeds hold together with {100 * confidence:g} %, each alone "
        f"with {100 * given[0].confidence:.4g} %. {images}{f' {PER_POINT}' if paid else ''}"
    )


def _costs(results: Sequence[Result], comparisons: Sequence[Comparison]) -> list[str]:
    """Return a line on what the trainings cost, and one on each gain or loss that is clear."""
    spent = sum(r.usd for r in results)
    if not spent:
        return []
    return [f"{len(results)} trainings cost ${dollars(spent)}"] + [
        f"{c.arm} against {c.reference}: {usd_more(c)} $ a training, {usd_per_point(c)} "
        f"$ {'for each point gained' if c.accuracy.value > 0 else 'saved for each point lost'}"
        for c in comparisons
        if c.usd_per_point
    ]


def _keys(labels: Sequence[str]) -> dict[str, str]:
    """Return a name for each arm: levels only where one factor is varied, MLflow's characters, no name twice."""
    alone = {label.partition("=")[0] for label in labels}
    single = len(alone) == 1 and all(label.count("=") == 1 for label in labels)
    found: dict[str, str] = {}
    for label in labels:
        text = label.partition("=")[2] if single else label.replace("=", " ")
        key = re.sub(r"[^\w. -]", "_", text.replace(",", ""), flags=re.ASCII).strip(" .") or "_"
        while key in found.values():
            key += "_"
        found[label] = key
    return found
