"""`report.html` of the evaluation: what was measured and what other stages left come in, one page goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.config import flatten, label_of
from cnn_tuning.data.packed import Meta
from cnn_tuning.evaluation import chapters
from cnn_tuning.evaluation.chapters import Folders
from cnn_tuning.evaluation.comparison import Comparison
from cnn_tuning.evaluation.metrics import Metrics
from cnn_tuning.evaluation.mistakes import Mistake
from cnn_tuning.reports.page import data_uri, embedded, render
from cnn_tuning.statistics import Estimate

PICTURES = (
    ("Confusion matrix", "confusion.png"),
    ("Calibration", "calibration.png"),
)
CURVES = (("Learning curves", "learning_curves.png"),)
# Above so many classes their table is folded away.
MOST_CLASSES = 20


@dataclass(frozen=True)
class Section:
    """One model, as the page tells of it.

    `folder` holds its pictures, `recipe` is what it was trained with, `mistakes` are the most confident ones,
    `gate` is what became of it in the registry, `run` that of its evaluation.
    """

    name: str
    metrics: Metrics
    folder: Path
    weights: str
    best: Mapping[str, float]
    training: Mapping[str, Any]
    recipe: Mapping[str, Any]
    mistakes: Sequence[Mistake]
    gate: str
    run: str


@dataclass(frozen=True)
class Origin:
    """Where the page's values come from: prepared data, the stages' folders, `facts` of code and machine."""

    meta: Meta
    prepared: Path
    folders: Folders
    facts: Mapping[str, str]


def write_report(
    path: Path,
    origin: Origin,
    sections: Sequence[Section],
    comparison: Comparison | None,
    *,
    bins: int,
    price_per_hour: float,
) -> None:
    """Write the page; it is about the last of `sections`, and `bins` are those of the calibration."""
    folders, meta = origin.folders, origin.meta
    searched = chapters.search(folders.search, sections[0].recipe)
    diagnosed = chapters.diagnosis(folders.diagnosis)
    spent = chapters.spent(folders, sections[0].training, price_per_hour)
    text = render(
        "evaluation.html.jinja",
        title=f"{meta.name}: evaluation",
        headline=_headline(sections[-1]),
        verdict=comparison.sentence("The tuned model", "the baseline") + "." if comparison else "",
        gate=sections[-1].gate,
        tiles=_tiles(sections[-1], comparison, diagnosed, spent),
        names=[section.name for section in sections],
        figures=_figures([section.metrics for section in sections], bins),
        changed=_changed(sections),
        ablation=chapters.ablation(folders.ablation),
        search=searched,
        diagnosis=diagnosed,
        models=[_model(section, meta) for section in reversed(sections)],
        data=chapters.data_sheet(folders.data, origin.prepared, meta),
        spent=spent,
        worth=chapters.worth(spent["tuning_usd"], comparison.gain)[0] if comparison else "",
        facts=_lineage(origin, sections),
    )
    path.write_text(text, encoding="utf-8")


def _headline(section: Section) -> str:
    metrics = section.metrics
    return (
        f"The {section.name}{'' if section.name == 'baseline' else ' model'} answers {metrics.accuracy.value:.2%} "
        f"of {metrics.count:,} test images rightly ({100 * metrics.confidence:g} % interval "
        f"{interval(metrics.accuracy, '.2%')})."
    )


def _tiles(
    section: Section,
    comparison: Comparison | None,
    diagnosed: Sequence[Mapping[str, Any]] | None,
    spent: Mapping[str, Any],
) -> list[tuple[str, str, str]]:
    """Return the figures to be seen first: name, value, remark."""
    accuracy = section.metrics.accuracy
    tiles = [(f"test accuracy, {section.name}", f"{accuracy.value:.2%}", interval(accuracy, ".2%"))]
    if comparison:
        gain, low, high = (100 * x for x in (comparison.gain.value, comparison.gain.low, comparison.gain.high))
        sure = "" if comparison.p < 1 - comparison.confidence else ", within chance"
        tiles.append(("against the baseline", f"{gain:+.2f} points", f"[{low:.2f}, {high:.2f}]{sure}"))
    if diagnosed:
        fired = {part["model"] or section.name: part["counts"]["fired"] for part in diagnosed}
        remark = ", ".join(f"{name} {count}" for name, count in fired.items())
        tiles.append(("findings of the diagnosis", str(sum(fired.values())), remark))
    _, count, time, cost = spent["rows"][-1]
    trainings = f"{count} trainings" if count != "1" else "one training"
    tiles.append(("time to train", time, f"{trainings}, {cost}" if spent["priced"] else trainings))
    return tiles


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


def _changed(sections: Sequence[Section]) -> list[tuple[str, str, str]]:
    """Return what the two models were trained with differently: name, baseline's value, tuned model's."""
    if len(sections) < 2:
        return []
    first, last = (flatten(section.recipe) for section in (sections[0], sections[-1]))
    names = [name for name in {**first, **last} if first.get(name) != last.get(name)]
    return [(name, label_of(first.get(name, "–")), label_of(last.get(name, "–"))) for name in names]


def _model(section: Section, meta: Meta) -> dict[str, Any]:
    metrics, training = section.metrics, section.training
    rate = training["samples_per_second"]
    return {
        "name": section.name,
        "mistakes": [
            {
                "index": mistake.index,
                "picture": data_uri(mistake.picture),
                "heat": None if mistake.heat is None else data_uri(mistake.heat),
                "true": mistake.true,
                "answer": mistake.answer,
                "probability": f"{mistake.probability:.0%}",
            }
            for mistake in section.mistakes
        ],
        "wrong": int(metrics.confusion.sum() - metrics.confusion.trace()),
        "pictures": embedded([(caption, section.folder / file) for caption, file in PICTURES]),
        "curves": embedded([(caption, section.folder / file) for caption, file in CURVES]),
        "classes": [
            {
                "name": name,
                "images": f"{metrics.confusion[i].sum():,}",
                "cells": [_cell(metrics.recall[name], ".2%"), _cell(metrics.precision[name], ".2%")],
            }
            for i, name in enumerate(meta.classes)
        ],
        "folded": len(meta.classes) > MOST_CLASSES,
        "facts": {
            "chosen epoch": f"{section.best['epoch']} (step {section.best['step']})",
            "trained": f"{chapters.duration(training['seconds']['fit'])}, {rate:,} samples/s",
            "on": f"{training['device']}, precision {training['precision']}, threads: {training['threads']}",
        },
    }


def _lineage(origin: Origin, sections: Sequence[Section]) -> dict[str, str]:
    meta = origin.meta
    facts = {"data": f"{meta.name}, split with seed {meta.seed}", "data digest": meta.digest}
    facts |= {f"raw data: {name} (SHA-256)": digest for name, digest in meta.sources.items()}
    for section in sections:
        facts |= {
            f"{section.name}: weights (SHA-256)": section.weights,
            f"{section.name}: training run": str(section.training.get("run", "–")),
            f"{section.name}: evaluation run": section.run,
            f"{section.name}: registry": section.gate,
        }
    return {**origin.facts, **facts}


def _cell(estimate: Estimate | None, form: str) -> tuple[str, str]:
    return (format(estimate.value, form), interval(estimate, form)) if estimate else ("–", "–")


def interval(estimate: Estimate, form: str) -> str:
    """Return the bounds as `[low, high]`."""
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]"
