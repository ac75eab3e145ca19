"""`report.html` of the evaluation: metrics, pictures and facts of each model come in, one page goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.data.packed import Meta
from cnn_tuning.evaluation.metrics import Metrics
from cnn_tuning.reports.page import embedded, render
from cnn_tuning.statistics import Estimate

PICTURES = (
    ("Mistakes, the most confident first", "mistakes.png"),
    ("Confusion matrix", "confusion.png"),
    ("Learning curves", "learning_curves.png"),
    ("Calibration", "calibration.png"),
)


@dataclass(frozen=True)
class Section:
    """One model, as the page tells of it; `folder` holds its pictures, `registered` is the gate's sentence."""

    name: str
    metrics: Metrics
    folder: Path
    weights: str
    best: Mapping[str, float]
    training: Mapping[str, Any]
    registered: str


def write_report(path: Path, meta: Meta, sections: Sequence[Section], verdict: str, bins: int) -> None:
    """Write the page; `verdict` compares the models where there are two, `bins` are those of the calibration."""
    last = sections[-1].metrics
    headline = verdict or (
        f"{last.accuracy.value:.2%} of {last.count:,} test images are classified correctly "
        f"({100 * last.confidence:g} % interval {interval(last.accuracy, '.2%')})."
    )
    counts = ", ".join(f"{sum(n):,} {split}" for split, n in meta.counts.items())
    text = render(
        "evaluation.html.jinja",
        title=f"{meta.name}: evaluation",
        headline=headline,
        names=[section.name for section in sections],
        figures=_figures([section.metrics for section in sections], bins),
        models=[
            {
                "name": section.name,
                "classes": _classes(section.metrics, meta.classes),
                "pictures": embedded([(caption, section.folder / file) for caption, file in PICTURES]),
                "facts": _facts(section),
            }
            for section in sections
        ],
        facts={"data": f"{meta.name}, {counts}", "data digest": meta.digest},
    )
    path.write_text(text, encoding="utf-8")


def _figures(models: Sequence[Metrics], bins: int) -> list[dict[str, Any]]:
    wilson, bootstrap = "Wilson score interval", "percentile bootstrap over images"
    rows = (
        ("accuracy", "accuracy", ".2%", wilson),
        ("macro F1", "macro_f1", ".4f", bootstrap),
        ("log-loss", "log_loss", ".4f", bootstrap),
        ("calibration error", "calibration_error", ".4f", f"{bins} bins; {bootstrap}; biased upwards"),
    )
    return [
        {"name": name, "how": how, "cells": [_cell(getattr(m, attribute), form) for m in models]}
        for name, attribute, form, how in rows
    ]


def _classes(metrics: Metrics, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "images": f"{metrics.confusion[i].sum():,}",
            "cells": [_cell(metrics.recall[name], ".2%"), _cell(metrics.precision[name], ".2%")],
        }
        for i, name in enumerate(names)
    ]


def _facts(section: Section) -> dict[str, str]:
    training = section.training
    return {
        "registry": section.registered or "not registered",
        "chosen epoch": f"{section.best['epoch']} (step {section.best['step']})",
        "training": f"{training['seconds']['train']} s at {training['samples_per_second']:,} samples/s",
        "device": f"{training['device']}, precision {training['precision']}, threads: {training['threads']}",
        "weights (SHA-256)": section.weights,
    }


def _cell(estimate: Estimate | None, form: str) -> tuple[str, str]:
    return (format(estimate.value, form), interval(estimate, form)) if estimate else ("–", "–")


def interval(estimate: Estimate, form: str) -> str:
    """Return the bounds as `[low, high]`."""
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]"
