"""Runs side by side in the terminal: `Compared` rows come in, a table with what to mind about it goes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cnn_tuning.reports.scales import dollars

NOTHING = "–"
# Below this width a run takes two lines.
WIDE = 110


@dataclass(frozen=True)
class Compared:
    """One run beside others; what was not recorded is None.

    `split`: which images `accuracy` is of; `confidence` is that of its interval. `usd` is `seconds` (of the whole
    run) at `price_per_hour`, None where no price was set. `dirty`: the code was not quite that of `commit`.
    """

    run: str
    name: str
    kind: str
    status: str
    experiment: str
    data: str
    seed: str
    commit: str
    dirty: bool
    host: str
    device: str
    split: str | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    seconds: float | None
    samples_per_second: float | None
    price_per_hour: float
    usd: float | None
    started: float


def print_compared(rows: Sequence[Compared], console: Console | None = None) -> None:
    """Print the table in the terminal's width, nothing cut off, and what to mind."""
    console = console or Console(highlight=False, markup=False)
    console.print(_table(rows, wide=console.width >= WIDE))
    for note in notes(rows):
        console.print(note, soft_wrap=True)


def _table(rows: Sequence[Compared], *, wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="bold", show_edge=False)
    commits = len({row.commit for row in rows}) > 1
    names = ["run", "host", *(["device"] if wide else []), *(["commit"] if commits and wide else [])]
    for name in names:
        table.add_column(name, overflow="fold")
    for name in ("accuracy, %", "time", "samples/s", *(["$/h"] if wide else []), "$"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        what = row.name if row.status == "FINISHED" else f"{row.name} ({row.status.lower()})"
        commit, run = row.commit[:8], short_id(row.run) + ("+" if row.dirty else "")
        left = [what, row.host, row.device or NOTHING, *([commit] if commits else [])]
        if not wide:
            run += f" at {commit}" if commits else ""
            left = [f"{what}\n{run}", f"{row.host}\n{row.device}"]
        else:
            left[0] += f"  {run}"
        table.add_row(*left, *_figures(row, wide=wide))
    return table


def _figures(row: Compared, *, wide: bool) -> list[str]:
    speed = NOTHING if row.samples_per_second is None else f"{row.samples_per_second:,.0f}"
    price = [_usd(row.price_per_hour or None)] if wide else []
    return [accuracy_text(row, " " if wide else "\n"), duration(row.seconds), speed, *price, _usd(row.usd)]


def _usd(value: float | None) -> str:
    return NOTHING if value is None else dollars(value)


def short_id(run: str) -> str:
    """Return what is enough to name a run: of an id the beginning, of a spool's key the end."""
    return run.rpartition("-")[2][:8]


def accuracy_text(row: Compared, between: str = " ") -> str:
    """Return the accuracy in per cent with its interval; `v` marks one of validation images."""
    if row.accuracy is None:
        return NOTHING
    text = f"{100 * row.accuracy:.2f}{'v' if row.split == 'val' else ''}"
    if row.accuracy_low is None or row.accuracy_high is None:
        return text
    return f"{text}{between}[{100 * row.accuracy_low:.2f}, {100 * row.accuracy_high:.2f}]"


def duration(seconds: float | None) -> str:
    """Return a time in the unit that fits."""
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def notes(rows: Sequence[Compared]) -> list[str]:
    """Return what a reader has to know before comparing."""
    commits, told = {row.commit for row in rows}, []
    seconds = [row.seconds for row in rows if row.seconds is not None]
    priced = [row.usd for row in rows if row.usd is not None]
    together = f"{len(rows)} run{'s' if len(rows) > 1 else ''}, together {duration(sum(seconds))}"
    rest = "" if len(priced) == len(rows) else f" for the {len(priced)} that had a price"
    told.append(together + (f", ${dollars(sum(priced))}{rest}" if priced else ""))
    if not priced:
        told.append("No $: no price was set when they ran (tracking.price_per_hour).")
    if len(commits) > 1:
        told.append(f"Different code: runs of {len(commits)} commits.")
    else:
        told.append(f"Commit {rows[0].commit[:12]}.")
    changed = sum(row.dirty for row in rows)
    if changed:
        told.append(f"Uncommitted changes in {changed} of them (+): code or configuration may differ.")
    data: dict[str, set[str]] = {}
    for row in rows:
        data.setdefault(row.experiment, set()).update([row.data] if row.data else [])
    told += [f"Different data in {name}: accuracies do not compare." for name, own in data.items() if len(own) > 1]
    if any(row.split == "val" for row in rows):
        told.append(
            "v: of the validation images that chose the epoch, so biased upwards; the others: test images."
        )
    if any(row.accuracy_low is not None for row in rows):
        told.append("Intervals: 95 %, over images; another seed may differ by more.")
    return told
