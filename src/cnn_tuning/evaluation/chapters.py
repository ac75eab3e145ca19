"""What the stages before found, as chapters of the page: their folders come in, values for the template go out.

A chapter is None where its stage left nothing: an experiment without it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cnn_tuning.config import flatten
from cnn_tuning.data.packed import Meta
from cnn_tuning.diagnosis.findings import Finding, read_findings
from cnn_tuning.reports.ablation import Cell, Table
from cnn_tuning.reports.findings import value_text
from cnn_tuning.reports.page import embedded
from cnn_tuning.reports.scales import NAMES, dollars, show, show_parameter
from cnn_tuning.reports.search_plots import PICTURES
from cnn_tuning.statistics import Estimate

# What a reader needs first of a search; the other plots are folded away.
FIRST_PLOTS = ("history", "pareto", "importance", "parallel")
TUNING = ("search", "refit of the best trial")


@dataclass(frozen=True)
class Folders:
    """Where the results of the stages before stand; a folder may be missing."""

    data: Path
    training: Path
    ablation: Path
    search: Path
    diagnosis: Path


def ablation(folder: Path) -> list[dict[str, Any]] | None:
    """Return each question's verdicts, differences and plots."""
    questions = [
        {
            "name": table.parent.name,
            "verdicts": (table.parent / "verdicts.txt").read_text(encoding="utf-8").splitlines(),
            "table": _differences(rows_of(table)),
            "pictures": _pictures(
                table.parent,
                (("differences", "Differences and their intervals"), ("heatmap", "Accuracy by both factors")),
            ),
        }
        for table in sorted(folder.glob("*/comparisons.csv"))
    ]
    return questions or None


def _differences(rows: Sequence[Mapping[str, str]]) -> Table:
    paid = any(row.get("usd_difference") for row in rows)
    cells = [
        [
            Cell(row["arm"]),
            Cell(row["reference"]),
            Cell(row["seeds"]),
            *(_difference(row, what) for what in ("accuracy", "gap")),
            Cell(f"{row['images_won']} : {row['images_lost']}" if row["mcnemar_p"] else "–"),
            *([_per_point(row)] if paid else []),
        ]
        for row in rows
    ]
    head = ["arm", "against", "seeds", "accuracy, points", "train-val gap, points", "images won : lost"]
    return Table([*head, *(["$ per point"] if paid else [])], cells, names=2)


def _per_point(row: Mapping[str, str]) -> Cell:
    """Return the dollars for each point gained, or saved for each point lost."""
    texts = [row[f"usd_per_point{end}"] for end in ("", "_low", "_high")]
    if not all(texts):
        return Cell("no gain shown")
    value, low, high = (dollars(float(text), signed=True) for text in texts)
    return Cell(f"{value} [{low}, {high}]" + (" saved" if float(row["accuracy_difference"]) < 0 else ""))


def _difference(row: Mapping[str, str], what: str) -> Cell:
    """Return a difference in points, strong where its interval does not hold zero."""
    texts = [row[f"{what}_{part}"] for part in ("difference", "low", "high")]
    value, low, high = (100 * float(text) if text else None for text in texts)
    if value is None:
        return Cell("–")
    if low is None or high is None:
        return Cell(f"{value:+.2f}")
    return Cell(f"{value:+.2f} [{low:.2f}, {high:.2f}]", strong=low > 0 or high < 0)


def search(folder: Path, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was searched and found; `own` is the recipe that the search started from."""
    if not (folder / "best.json").exists():
        return None
    best, counts = _json(folder / "best.json"), _json(folder / "metrics.json")["search"]
    shares: Mapping[str, float] = next(iter(_json(folder / "importances.json")["shares"].values()), {})
    started = flatten(own)
    plots = {name: (name, caption) for name, (caption, _) in PICTURES.items()}
    return {
        "sentence": _found(best, counts),
        "weighed": bool(shares),
        "parameters": [
            (
                name,
                show_parameter(value),
                # Of a choice between sections, such as two optimizers, the name is what a person reads.
                show_parameter(started.get(name, started.get(f"{name}.name", "–"))),
                f"{shares[name]:.0%}" if name in shares else "–",
            )
            for name, value in best["parameters"].items()
        ],
        "refit": _refit(folder / "refit.csv"),
        "pictures": _pictures(folder, [plots[name] for name in FIRST_PLOTS]),
        "more": _pictures(folder, [plot for name, plot in plots.items() if name not in FIRST_PLOTS]),
    }


def _found(best: Mapping[str, Any], counts: Mapping[str, float]) -> str:
    """Return in words how many trials there were, and which was the best."""
    made = f"{counts['trials']} trials, {counts['pruned']} of them pruned and {counts['failed']} failed"
    if best["trial"] is None:
        return f"{made}: none completed, so the experiment's own values stand."
    values = ", ".join(f"{NAMES[metric]} {show(metric, value)}" for metric, value in best["values"].items())
    own = [
        show(metric, counts[name])
        for metric in best["values"]
        if (name := f"own_{metric.replace('/', '_')}") in counts
    ]
    first = NAMES[next(iter(best["values"]))]
    front = f" in {first} of the {len(best['front'])} on the Pareto front" if "front" in best else ""
    against = f"; the experiment's own values, trained as shortly, came to {', '.join(own)}" if own else ""
    return f"{made}. Trial {best['trial']} was the best{front}: {values}{against}."


def _refit(table: Path) -> str:
    if not table.exists():
        return ""
    values = [float(row["val/accuracy"]) for row in rows_of(table)]
    several = f" (mean of {len(values)} seeds, {min(values):.2%} to {max(values):.2%})" if len(values) > 1 else ""
    return f"Trained with all epochs, these values reach {mean(values):.2%} validation accuracy{several}."


def diagnosis(folder: Path) -> list[dict[str, Any]] | None:
    """Return the findings of each model, the last one first: those that fired in full, the others as lines."""
    files = sorted(folder.rglob("findings.json"), reverse=True)
    return [_findings(file.parent.relative_to(folder).name, read_findings(file)) for file in files] or None


def _findings(model: str, found: Sequence[Finding]) -> dict[str, Any]:
    return {
        "model": model,
        "fired": [
            {
                "name": f.rule,
                "rule": f.rule.replace("_", " "),
                "since": "" if f.first_step is None else f"since step {f.first_step:,}",
                "explanation": f.explanation,
                "evidence": [(name.replace("_", " "), value_text(value)) for name, value in f.evidence.items()],
                "advice": f.advice,
                "remedy": _patch(f),
            }
            for f in found
            if f.status == "fired"
        ],
        "others": [(f.rule.replace("_", " "), f.status, f.explanation) for f in found if f.status != "fired"],
        "counts": {status: sum(f.status == status for f in found) for status in ("fired", "ok", "not evaluated")},
    }


def _patch(finding: Finding) -> str:
    """Return the remedy as lines of `params.yaml`."""
    import yaml

    tree: dict[str, Any] = {}
    for name, value in finding.remedy.items():
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).strip() if tree else ""


def data_sheet(folder: Path, prepared: Path, meta: Meta) -> dict[str, Any]:
    """Return what the data are; its plots are those that `preprocess` left."""
    channels, height, width = meta.shape
    rejected = prepared / "rejected.csv"
    images = {split: f"{sum(counts):,}" for split, counts in meta.counts.items()}
    learned = meta.counts["train"]
    facts = {
        "images": ", ".join(f"{count} {split}" for split, count in images.items()),
        "classes": f"{len(meta.classes):,}, with {min(learned):,} to {max(learned):,} training images each",
        "pictures": f"{width}×{height} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "mean and spread": f"{_each(meta.mean)} and {_each(meta.std)} of pixels in [0, 1], training split",
        **({"rejected files": f"{len(rows_of(rejected)):,}"} if rejected.exists() else {}),
    }
    plots = (("classes", "Images of each class"), ("images", "Some training images of each class"))
    return {"facts": facts, "pictures": _pictures(folder, plots)}


def _each(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def spent(folders: Folders, training: Mapping[str, Any], price_per_hour: float) -> dict[str, Any]:
    """Return a row for each stage that trained: what, trainings, time, cost; then their sum.

    A training that was known from before counts with the time that it took then.
    """
    price = price_per_hour / 3600
    first = float(training["seconds"]["fit"])
    rows = [("training of the baseline", 1, first, first * price)]
    arms = [row for table in sorted(folders.ablation.glob("*/runs.csv")) for row in rows_of(table)]
    trials = rows_of(folders.search / "trials.csv") if (folders.search / "trials.csv").exists() else []
    refits = rows_of(folders.search / "refit.csv") if (folders.search / "refit.csv").exists() else []
    for what, trainings in (("ablations", arms), (TUNING[0], trials), (TUNING[1], refits)):
        if trainings:
            seconds = sum(float(row["seconds"] or 0) for row in trainings)
            # Arms and trials side by side share the price, which their tables have seen to.
            usd = sum(float(row.get("usd") or 0) for row in trainings) or seconds * price
            rows.append((what, len(trainings), seconds, usd))
    tuning = sum(usd for what, _, _, usd in rows if what in TUNING)
    if len(rows) > 1:
        rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows)))
    profiles = (folders.training / "profile.html", folders.search / "refit/profile.html")
    return {
        "profiles": [path.as_posix() for path in profiles if path.exists()],
        "priced": price_per_hour > 0,
        "tuning_usd": tuning,
        "price": f"${price_per_hour:g}",
        "rows": [
            (what, f"{count:,}", duration(seconds), f"${dollars(usd)}") for what, count, seconds, usd in rows
        ],
    }


def worth(usd: float, gain: Estimate) -> tuple[str, dict[str, float]]:
    """Return what tuning cost for each point of test accuracy that it gained over the baseline, and its figures.

    The bounds are those of the gain, over test images; with a gain that chance is not ruled out for, a point may
    have cost any amount, and only the least one is known.
    """
    if usd <= 0:
        return "", {}
    points, low, high = (100 * x for x in (gain.value, gain.low, gain.high))
    spent = f"The search and its refits cost ${dollars(usd)}"
    figures = {"tuning_usd": usd}
    if high <= 0:
        return f"{spent} and gained no test accuracy.", figures
    figures["usd_per_point_low"] = usd / high
    if low <= 0:
        least = f"at least ${dollars(usd / high)} for each point of test accuracy"
        return f"{spent}: {least}, if it gained any, which chance is not ruled out for.", figures
    bounds = f"[{dollars(usd / high)}, {dollars(usd / low)}]"
    return f"{spent}: ${dollars(usd / points)} {bounds} for each point of test accuracy gained.", {
        **figures,
        "usd_per_point": usd / points,
        "usd_per_point_high": usd / low,
    }


def duration(seconds: float) -> str:
    """Return a time as a person reads it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _pictures(folder: Path, wanted: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (caption, PNG in base64) of those (name, caption) that were drawn."""
    there = [(caption, folder / f"{name}.png") for name, caption in wanted]
    return embedded([(caption, path) for caption, path in there if path.exists()])


def rows_of(table: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
