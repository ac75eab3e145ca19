"""Which pictures an ablation has: its results come in, PNG files with captions go out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnn_tuning.ablation.compare import Comparison, Difference, Result, by_arm
from cnn_tuning.ablation.tables import Arm, shared_reference, signed, spread
from cnn_tuning.config import EQUAL_UPDATES, QuestionConfig, levels_of
from cnn_tuning.reports.arms import Row, draw_heat_map, draw_rows
from cnn_tuning.statistics import mean_interval

Pictures = list[tuple[str, Path]]


def draw(
    folder: Path,
    question: QuestionConfig,
    results: Sequence[Result],
    arms: Sequence[Arm],
    comparisons: Sequence[Comparison],
    confidence: float,
) -> Pictures:
    """Draw what there is to draw, and return (caption, picture)."""
    level = f"{100 * confidence:g} %"
    return [
        *_differences(folder / "differences.png", comparisons, level),
        *(_arms(folder, by_arm(results), arms, confidence, level) if any(arm.seeds for arm in arms) else []),
        *(_heat_maps(folder / "heatmap.png", question, arms) if len(question.factors) == 2 else []),
    ]


def _differences(path: Path, comparisons: Sequence[Comparison], level: str) -> Pictures:
    met = [c for c in comparisons if c.seeds]
    if not any(d.interval for c in met for d in (c.accuracy, c.gap)):
        return []
    shared = shared_reference(comparisons)
    against = f" from {shared}" if shared else ""
    labels = [c.arm if shared else f"{c.arm}\nagainst {c.reference}" for c in met]
    panels = {
        f"Difference in {figure}{against}, points": [
            _difference(label, getattr(c, name)) for label, c in zip(labels, met, strict=True)
        ]
        for name, figure in (("accuracy", "validation accuracy"), ("gap", "train-validation gap"))
    }
    note = f"dots: seeds; diamond: mean; bars: intervals, {level} together; grey: not distinguishable from 0"
    draw_rows(panels, note, path, zero=True)
    return [("Differences and their intervals: what the verdicts go by", path)]


def _difference(label: str, d: Difference) -> Row:
    bounds = (100 * d.interval.low, 100 * d.interval.high) if d.interval else None
    return Row(label, tuple(100 * x for x in d.by_seed), bounds, signed(d), strong=d.is_clear)


def _arms(
    folder: Path, grouped: Mapping[str, Sequence[Result]], arms: Sequence[Arm], confidence: float, level: str
) -> Pictures:
    several = any(arm.seeds > 1 for arm in arms)
    note = f"dots: seeds; diamond: mean; bar: {level} t interval of the mean" if several else ""
    found: Pictures = []
    for name, figure, title in (
        ("arms.png", "val_accuracy", "Validation accuracy of the best epoch, %"),
        ("gap.png", "gap", "Train-validation gap after the last epoch, points"),
    ):
        rows = []
        for arm in arms:
            values = [100 * getattr(r, figure) for r in grouped[arm.arm] if r.right is not None]
            interval = mean_interval(values, confidence)
            text = spread(getattr(arm, figure), getattr(arm, f"{figure}_std")) if values else ""
            failed = f"failed: {arm.failed} of {arm.failed + arm.seeds}" if arm.failed else ""
            rows.append(
                Row(
                    label=arm.arm,
                    values=tuple(values),
                    interval=(interval.low, interval.high) if interval else None,
                    text="\n".join(filter(None, (text, failed))),
                )
            )
        draw_rows({title: rows}, note, folder / name, zero=False)
        found.append((title.rpartition(",")[0] + " of each training", folder / name))
    return found


def _heat_maps(path: Path, question: QuestionConfig, arms: Sequence[Arm]) -> Pictures:
    factors = {name.rpartition(".")[2]: list(levels_of(values)) for name, values in question.factors.items()}
    (first, rows), (second, columns) = ((name, _sorted(levels)) for name, levels in factors.items())
    by_label = {arm.arm: arm for arm in arms}
    panels = {}
    for title, suffix in (("Mean validation accuracy, %", ""), ("The same at equal updates", EQUAL_UPDATES)):
        cells = {
            (a, b): by_label.get(f"{first}={a}, {second}={b}{suffix}") or by_label[f"{first}={a}, {second}={b}"]
            for a, b in itertools.product(rows, columns)
        }
        if not suffix or any(arm.arm.endswith(suffix) for arm in cells.values()):
            panels[title] = [[_cell(cells[a, b]) for b in columns] for a in rows]
    draw_heat_map(panels, (first, second), (rows, columns), path)
    return [("Mean validation accuracy by both factors", path)]


def _cell(arm: Arm) -> tuple[float | None, str]:
    total = arm.seeds + arm.failed
    if not arm.seeds:
        return None, "failed"
    mark = f"\n{arm.failed} of {total} failed" if arm.failed else ""
    return 100 * arm.val_accuracy, spread(arm.val_accuracy, arm.val_accuracy_std).replace(" ±", "\n±") + mark


def _sorted(levels: Sequence[str]) -> Sequence[str]:
    """Return numbers in their order, anything else as it stands."""
    try:
        return sorted(levels, key=float)
    except ValueError:
        return levels
