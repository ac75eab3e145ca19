"""The data sheet of a folder before any experiment: a `Survey` comes in; a page, JSON and a few lines go out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cnn_tuning.data.survey import Picture, Survey
from cnn_tuning.reports.page import data_uri, render

_SHOWN = 200
_PICTURED = 40
_IMBALANCED = 10


def write_sheet(survey: Survey, name: str, source: str, folder: Path) -> None:
    """Write `sheet.html` and `sheet.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sheet.json").write_text(json.dumps(_facts(survey, name, source), indent=1) + "\n", encoding="utf-8")
    across, within = survey.across_splits(), survey.within_splits()
    rows = [(n, [survey.counts[s][i] for s in survey.splits]) for i, n in enumerate(survey.classes)]
    page = render(
        "survey.html.jinja",
        title=f"{name}: data sheet",
        headline=headline(survey),
        notes=notes(survey),
        splits=survey.splits,
        classes=sorted(rows, key=lambda row: -sum(row[1])),
        sizes=_sizes(survey),
        across=[_pair(survey.root, *pair, pictured=i < _PICTURED) for i, pair in enumerate(across)],
        within=[_pair(survey.root, *pair, pictured=i < _PICTURED) for i, pair in enumerate(within[:_SHOWN])],
        unreadable=[(_printable(path), reason) for path, reason in survey.unreadable],
        facts={"source": source, "pictures": f"{len(survey.pictures):,}"},
    )
    (folder / "sheet.html").write_text(page, encoding="utf-8")


def headline(survey: Survey) -> str:
    """Return how much there is, in a line."""
    splits = ", ".join(f"{sum(n):,} {split}" for split, n in survey.counts.items())
    return f"{len(survey.pictures):,} readable pictures ({splits}) of {len(survey.classes)} classes."


def notes(survey: Survey) -> list[tuple[str, str]]:
    """Return what to know and what to mend: (`clear` or `failed`, a sentence)."""
    sizes = {name: survey.counts["train"][i] for i, name in enumerate(survey.classes)}
    least, most = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
    across, within = survey.across_splits(), survey.within_splits()
    torn = sum(a.label != b.label for a, b in (*across, *within))
    found = []
    if survey.unreadable:
        found.append(("failed", f"{len(survey.unreadable):,} unreadable or stray files are left out."))
    if across:
        found.append(("failed", f"{len(across):,} near-duplicates across splits: the test would flatter."))
    if within:
        found.append(("failed", f"{len(within):,} near-duplicates within a split."))
    if torn:
        found.append(("failed", f"{torn:,} near-duplicates are in two classes: one label is wrong."))
    if sizes[most] >= _IMBALANCED * max(1, sizes[least]):
        found.append(
            ("failed", f"imbalance: {most} has {sizes[most]:,} training pictures, {least} {sizes[least]:,}.")
        )
    return found or [("clear", "Nothing to mend: all readable, no near-duplicates, no class ten times another.")]


def _sizes(survey: Survey) -> list[tuple[str, str]]:
    widths, heights = (np.array([getattr(p, side) for p in survey.pictures]) for side in ("width", "height"))
    quantiles = [0, 25, 50, 75, 100]

    def spread(values: np.ndarray) -> str:
        return " · ".join(f"{value:.0f}" for value in np.percentile(values, quantiles))

    return [
        ("width (least · quarter · half · three quarters · most)", spread(widths)),
        ("height", spread(heights)),
        ("formats", ", ".join(f"{n:,} {kind}" for kind, n in survey.tally("format").items())),
        ("modes", ", ".join(f"{n:,} {mode}" for mode, n in survey.tally("mode").items())),
    ]


def _pair(root: Path, first: Picture, second: Picture, *, pictured: bool) -> dict[str, Any]:
    pictures = [_picture(root / p.path) for p in (first, second)] if pictured else []
    return {
        "first": _printable(first.path),
        "second": _printable(second.path),
        "differ": first.label != second.label,
        "pictures": pictures,
    }


def _picture(path: Path) -> str:
    from cnn_tuning.config import ImageConfig
    from cnn_tuning.data.images import to_input

    return data_uri(to_input(path.read_bytes(), ImageConfig((80, 80), 3, "pad")).transpose(1, 2, 0))


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def _facts(survey: Survey, name: str, source: str) -> dict[str, Any]:
    """Return everything that was seen, as plain values."""

    def listed(pairs: list[tuple[Picture, Picture]]) -> list[dict[str, Any]]:
        return [
            {
                "paths": [_printable(a.path), _printable(b.path)],
                "splits": [a.split, b.split],
                "classes": [survey.classes[a.label], survey.classes[b.label]],
            }
            for a, b in pairs
        ]

    return {
        "name": name,
        "source": source,
        "classes": list(survey.classes),
        "counts": {split: dict(zip(survey.classes, n, strict=True)) for split, n in survey.counts.items()},
        "formats": survey.tally("format"),
        "modes": survey.tally("mode"),
        "sizes": dict(_sizes(survey)[:2]),
        "unreadable": [{"path": _printable(path), "reason": reason} for path, reason in survey.unreadable],
        "near_duplicates": {"across": listed(survey.across_splits()), "within": listed(survey.within_splits())},
        "notes": [text for _, text in notes(survey)],
    }
