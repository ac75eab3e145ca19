"""The page about an ablation: a `Section` for each question comes in, `report.html` goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cnn_tuning.reports.page import embedded, render


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, to be read first if `strong`."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Column names and lines; the first `names` columns are names, the others figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 1


@dataclass(frozen=True)
class Section:
    """One question, as a person reads it."""

    name: str
    question: str
    verdicts: Sequence[tuple[str, str]]  # (clear, open or failed; sentence)
    arms: Table
    comparisons: Table | None
    note: str
    pictures: Sequence[tuple[str, Path]]


class Reported(Protocol):
    """Whatever has a section of the page."""

    @property
    def page(self) -> Section:
        """Return its section."""


def write_report(path: Path, outcomes: Sequence[Reported], facts: Mapping[str, str]) -> None:
    """Write one page over all questions; pictures are put inside it."""
    sections = [(outcome.page, embedded(outcome.page.pictures)) for outcome in outcomes]
    path.write_text(render("ablation.html.jinja", sections=sections, facts=facts), encoding="utf-8")
