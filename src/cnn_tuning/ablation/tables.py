"""An ablation as tables: results and comparisons in, CSV files (fractions) and tables of a page (points) out."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cnn_tuning.ablation.compare import Comparison, Difference, Result
from cnn_tuning.ablation.verdict import p_text, points
from cnn_tuning.reports.ablation import Cell, Table
from cnn_tuning.reports.scales import dollars
from cnn_tuning.statistics import Estimate

NOTHING = "–"


@dataclass(frozen=True)
class Arm:
    """An arm over the seeds that finished; figures are means, NaN where there is none.

    They are of the best epochs, but `last_val_accuracy` and the gaps of the last ones.
    """

    arm: str
    seeds: int
    failed: int
    val_accuracy: float
    val_accuracy_std: float
    last_val_accuracy: float
    gap: float
    gap_std: float
    loss_gap: float
    train_accuracy: float
    val_loss: float
    seconds: float
    usd: float
    usd_std: float
    epochs: float
    updates: float
    findings: str = ""  # the rules that fired, each with the number of its trainings


def summarise(arm: str, results: Sequence[Result]) -> Arm:
    """Return an arm's means, and the standard deviations over its seeds."""
    done = [r for r in results if r.right is not None]
    values = {f.name: [getattr(r, f.name, math.nan) for r in done] for f in fields(Arm)[3:-1]}
    figures = {name: float(np.mean(own)) if done else math.nan for name, own in values.items()}
    for name in ("val_accuracy", "gap", "usd"):
        figures[f"{name}_std"] = float(np.std(values[name], ddof=1)) if len(done) > 1 else math.nan
    counts = Counter(rule for result in results for rule in result.findings)
    findings = ", ".join(f"{rule} {count}/{len(results)}" for rule, count in counts.most_common())
    return Arm(arm, len(done), len(results) - len(done), **figures, findings=findings)


def write_tables(
    folder: Path, results: Sequence[Result], arms: Sequence[Arm], comparisons: Sequence[Comparison]
) -> None:
    """Write `runs.csv`, `arms.csv` and `comparisons.csv`; what is unknown stays empty."""
    runs = ["arm", "seed", "val_accuracy", "train_accuracy", "val_loss", "last_val_accuracy", "gap", "loss_gap",
            "seconds", "usd", "epochs", "updates", "failure"]  # fmt: skip
    rows = ([*(getattr(r, name) for name in runs), " ".join(r.findings)] for r in results)
    _write(folder / "runs.csv", [*runs, "findings"], rows)
    columns = [field.name for field in fields(Arm)]
    _write(folder / "arms.csv", columns, ([getattr(a, name) for name in columns] for a in arms))
    head = [
        f"{what}_{x}"
        for what in ("accuracy", "gap", "loss_gap")
        for x in ("difference", "low", "high", "p", "settled_by")
    ]
    costs = [f"{what}{end}" for what in ("usd_difference", "usd_per_point") for end in ("", "_low", "_high")]
    _write(
        folder / "comparisons.csv",
        ["arm", "reference", "seeds", *head, "images_won", "images_lost", "mcnemar_p", *costs],
        (
            [
                *(c.arm, c.reference, len(c.seeds)),
                *(x for d in (c.accuracy, c.gap, c.loss_gap) for x in _numbers(d)),
                *(*_images(c), *_costs(c)),
            ]
            for c in comparisons
        ),
    )


def _numbers(d: Difference | None) -> list[float | int | None]:
    if d is None:
        return [None] * 5
    if d.interval is None:
        return [d.value, None, None, None, None]
    return [d.value, d.interval.low, d.interval.high, d.p, None if d.is_clear else d.seeds_to_settle]


def _costs(c: Comparison) -> list[float | None]:
    if not any(c.usd):
        return [None] * 6
    more, each = c.usd_more, c.usd_per_point
    return [
        float(np.mean(c.usd)),
        *((more.low, more.high) if more else (None, None)),
        *((each.value, each.low, each.high) if each else (None, None, None)),
    ]


def _images(c: Comparison) -> list[float | int | None]:
    return [c.images.won, c.images.lost, c.images.p] if c.seeds else [None, None, None]


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows([None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows)


def arms_table(arms: Sequence[Arm], reference: str) -> Table:
    """Return the table of arms that a page shows."""
    paid = any(arm.usd > 0 for arm in arms)
    losses = any(not math.isnan(arm.loss_gap) for arm in arms)
    head = ["arm", "seeds", "val accuracy (best epoch), %", "val accuracy (last epoch), %",
            "gap (last epoch), points", *(["gap in loss (last epoch)"] if losses else []),
            "val loss (best epoch)", "time", *(["cost, $"] if paid else []),
            "epochs", "updates", *(["findings"] if any(arm.findings for arm in arms) else [])]  # fmt: skip
    rows = []
    for a in arms:
        texts = [
            f"{a.seeds} of {a.seeds + a.failed}" if a.failed else str(a.seeds),
            spread(a.val_accuracy, a.val_accuracy_std),
            spread(a.last_val_accuracy, math.nan),
            spread(a.gap, a.gap_std),
            *([_known(a.loss_gap, f"{a.loss_gap:.4f}")] if losses else []),
            _known(a.val_loss, f"{a.val_loss:.4f}"),
            _known(a.seconds, f"{a.seconds:,.0f} s" if a.seconds >= 10 else f"{a.seconds:.1f} s"),
            *([_usd(a)] if paid else []),
            _known(a.epochs, f"{a.epochs:,.4g}"),
            _known(a.updates, f"{a.updates:,.0f}"),
            *([a.findings or NOTHING] if "findings" in head else []),
        ]
        name = f"{a.arm} (reference)" if a.arm == reference else a.arm
        rows.append([Cell(name), *map(Cell, texts)])
    return Table(head, rows)


def _usd(arm: Arm) -> str:
    if math.isnan(arm.usd):
        return NOTHING
    return dollars(arm.usd) + ("" if math.isnan(arm.usd_std) else f" ± {dollars(arm.usd_std)}")


def spread(mean: float, std: float) -> str:
    """Return mean ± standard deviation in per cent, as far as known."""
    if math.isnan(mean):
        return NOTHING
    return f"{100 * mean:.2f}" + ("" if math.isnan(std) else f" ± {100 * std:.2f}")


def comparisons_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Return the table of differences that a page shows; what is clear is strong."""
    met = [c for c in comparisons if c.seeds]
    shared = shared_reference(comparisons)
    names = [f"arm against {shared}"] if shared else ["arm", "against"]
    paid = any(any(c.usd) for c in met)
    losses = any(c.loss_gap for c in met)
    head = [*names, "seeds", "accuracy, points", "gap, points", *(["gap in loss"] if losses else []),
            "images won : lost", "McNemar p", *(["cost, $", "$ per point"] if paid else [])]  # fmt: skip
    rows = [
        [
            *map(Cell, [c.arm, str(len(c.seeds))] if shared else [c.arm, c.reference, str(len(c.seeds))]),
            *(Cell(signed(d), d.is_clear) for d in (c.accuracy, c.gap)),
            *([_of_loss(c.loss_gap)] if losses else []),
            Cell(f"{c.images.won:,} : {c.images.lost:,}"),
            Cell(p_text(c.images.p, c.significance).removeprefix("= "), c.images.p < c.significance),
            *(map(Cell, (usd_more(c), usd_per_point(c) + (", saved" if _saves(c) else ""))) if paid else ()),
        ]
        for c in met
    ]
    return Table(head, rows, names=len(names)) if met else None


def _of_loss(d: Difference | None) -> Cell:
    if d is None:
        return Cell(NOTHING)
    bounds = f" [{d.interval.low:+.4f}, {d.interval.high:+.4f}]" if d.interval else ""
    return Cell(f"{d.value:+.4f}{bounds}", d.is_clear)


def usd_more(c: Comparison) -> str:
    """Return what a training costs more, with its interval as far as there is one."""
    return _interval(c.usd_more) if c.usd_more else dollars(float(np.mean(c.usd)), signed=True)


def usd_per_point(c: Comparison) -> str:
    """Return the dollars for each point of accuracy gained, or saved for each point lost, as far as is known."""
    each = c.usd_per_point
    if each is None:
        return "no gain shown"
    return _interval(each)


def _saves(c: Comparison) -> bool:
    return c.usd_per_point is not None and c.accuracy.value < 0


def _interval(e: Estimate) -> str:
    # Two digits of the width, which is how much is known, for all three.
    digits = len(dollars(e.high - e.low).partition(".")[2])
    value, low, high = (f"{x:+,.{digits}f}" for x in (e.value, e.low, e.high))
    return f"{value} [{low}, {high}]"


def shared_reference(comparisons: Sequence[Comparison]) -> str | None:
    """Return the arm that all others are compared with, if it is one for all."""
    references = {c.reference for c in comparisons}
    return references.pop() if len(references) == 1 else None


def signed(d: Difference) -> str:
    """Return a difference in points with its interval, as far as there is one."""
    if d.interval is None:
        return f"{100 * d.value:+.2f}"
    value, low, high = points(d.interval, signed=True)
    return f"{value} [{low}, {high}]"


def _known(value: float, text: str) -> str:
    return NOTHING if math.isnan(value) else text
