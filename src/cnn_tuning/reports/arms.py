"""Pictures of an ablation as PNG: a `Row` for each arm or comparison, or cells, come in, pictures go out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.reports.plots import ACCENT, INK, PALE, SECOND, new_figure, save

LABEL_WIDTH = 34
# A row this many times further out than rows usually are, which would stretch the axis so many times, is named at
# its edge: shown, it would hide all others. An interval this many times longer than usual is cut.
_FAR = 10
_STRETCH = 4
_LONG = 5


@dataclass(frozen=True)
class Row:
    """A line of a picture, in per cent or points: a value a seed, their mean's interval, a text at its end."""

    label: str
    values: tuple[float, ...]
    interval: tuple[float, float] | None
    text: str
    strong: bool = True

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.values))


def draw_rows(panels: Mapping[str, Sequence[Row]], note: str, out: Path, *, zero: bool) -> None:
    """Draw the same rows in a panel for each title, one below the other; `zero` is marked."""
    labels = _wrapped([row.label for row in next(iter(panels.values()))])
    lines = sum(max(1.5, 0.5 + 0.6 * (label.count("\n") + 1)) for label in labels)
    figure, grid = new_figure(9.5, (0.75 + 0.27 * lines) * len(panels) + 0.2, rows=len(panels))
    for axes, (title, rows) in zip(np.atleast_1d(np.asarray(grid, dtype=object)), panels.items(), strict=True):
        _panel(axes, rows, labels, zero=zero)
        axes.set_title(title, loc="left")
    figure.supxlabel(note, fontsize=8, x=0.99, ha="right")
    save(figure, out)


def _panel(axes: Any, rows: Sequence[Row], labels: Sequence[str], *, zero: bool) -> None:
    drawn = [row for row in rows if row.values]
    low, high = _window(drawn, zero=zero) if drawn else (0.0, 1.0)
    if zero:
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for place, row in enumerate(rows):
        if row.values and low <= row.mean <= high:
            _row(axes, place, row, low, high)
        elif row.values:
            left = row.mean < low
            axes.text(low if left else high, place, f"{'◀ ' if left else ''}{row.mean:.2f}{'' if left else ' ▶'}",
                      ha="left" if left else "right", va="center", color=SECOND, fontweight="bold")  # fmt: skip
    axes.set(xlim=(low, high), ylim=(len(rows) - 0.5, -0.6))
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    ends = axes.secondary_yaxis("right")
    ends.set_yticks(range(len(rows)), [row.text for row in rows])
    ends.tick_params(length=0)
    ends.spines["right"].set_visible(False)


def _row(axes: Any, place: int, row: Row, low: float, high: float) -> None:
    colour = ACCENT if row.strong else "#7d8b97"
    if row.interval:
        ends = [max(row.interval[0], low), min(row.interval[1], high)]
        axes.plot(ends, [place, place], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55, zorder=2)
        for end, edge, marker in zip(row.interval, (low, high), ("<", ">"), strict=True):
            if not low <= end <= high:
                axes.plot([edge], [place], marker, color=colour, markersize=7, clip_on=False, zorder=3)
    axes.plot([row.mean], [place], "D", color=colour, markersize=6, zorder=4)
    if len(row.values) > 1:
        below = [place + 0.27] * len(row.values)
        axes.plot(row.values, below, "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0, zorder=3)


def _window(rows: Sequence[Row], *, zero: bool) -> tuple[float, float]:
    """Return the ends of the axis: all rows but those far out, and their intervals but those far too long."""
    middle = float(np.median([row.mean for row in rows]))
    usual = max(np.median([abs(row.mean - middle) for row in rows]), np.median([np.ptp(r.values) for r in rows]))
    outward = sorted(rows, key=lambda row: abs(row.mean - middle))
    near = [row for row in outward if abs(row.mean - middle) <= _FAR * usual] or outward
    low, high = _extent(near, zero=zero)
    for row in outward[len(near) :]:
        wider = _extent([*near, row], zero=zero)
        if wider[1] - wider[0] > _STRETCH * (high - low):
            break
        near.append(row)
    low, high = _extent(near, zero=zero)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _extent(rows: Sequence[Row], *, zero: bool) -> tuple[float, float]:
    places = [value for row in rows for value in row.values] + ([0.0] if zero else [])
    intervals = [row.interval for row in rows if row.interval]
    usual = np.median([high - low for low, high in intervals]) if intervals else 0.0
    places += [end for low, high in intervals if high - low <= _LONG * usual for end in (low, high)]
    return min(places), max(places)


def draw_heat_map(
    panels: Mapping[str, Sequence[Sequence[tuple[float | None, str]]]],
    names: tuple[str, str],
    levels: tuple[Sequence[str], Sequence[str]],
    out: Path,
) -> None:
    """Draw accuracies in per cent with their texts, a panel a title; None is a cell that failed."""
    rows, columns = levels
    values = np.array(
        [[[np.nan if v is None else v for v, _ in line] for line in cells] for cells in panels.values()]
    )
    # Colours follow the logarithm of the error, so that one bad cell does not make all others look alike.
    shade = -np.log10(np.maximum(100 - values, 0.01))
    known = shade[np.isfinite(shade)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    depths = 0.12 + 0.6 * (shade - low) / max(high - low, 0.1)
    height = (0.9 + 0.62 * len(rows)) * len(panels)
    figure, grid = new_figure(min(14.0, 3 + 1.15 * len(columns)), height, rows=len(panels))
    places = np.atleast_1d(np.asarray(grid, dtype=object))
    for axes, (title, cells), depth in zip(places, panels.items(), depths, strict=True):
        _heat_map(axes, depth, [[text for _, text in line] for line in cells])
        axes.set_xticks(range(len(columns)), [textwrap.fill(x, 16) for x in columns])
        axes.set_yticks(range(len(rows)), [textwrap.fill(x, 20) for x in rows])
        axes.set(xlabel=names[1], ylabel=names[0])
        axes.set_title(title, loc="left")
    save(figure, out)


def _heat_map(axes: Any, depth: NDArray[np.float64], texts: Sequence[Sequence[str]]) -> None:
    import matplotlib as mpl

    colours = mpl.colormaps["Blues"](depth)
    colours[np.isnan(depth)] = mpl.colors.to_rgba("#eceff1")
    axes.imshow(colours, aspect="auto")
    for (i, j), place in np.ndenumerate(depth):
        failed = bool(np.isnan(place))
        axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=9,
                  color=SECOND if failed else "white" if place > 0.55 else INK,
                  fontweight="bold" if failed else "normal")  # fmt: skip
    axes.set_xticks(np.arange(depth.shape[1] - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(depth.shape[0] - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _wrapped(labels: Sequence[str]) -> list[str]:
    """Return labels in lines: where one is too long, all break between factors, then at spaces and underscores."""
    if all(len(line) <= LABEL_WIDTH for label in labels for line in label.split("\n")):
        return list(labels)
    found = []
    for label in labels:
        lines = label.replace(", ", ",\n").split("\n")
        spaced = (line.replace("_", "_\0 ") if len(line) > LABEL_WIDTH else line for line in lines)
        text = "\n".join(textwrap.fill(line, LABEL_WIDTH) for line in spaced)
        found.append(text.replace("_\0 ", "_").replace("\0", ""))
    return found
