"""How values of a search are written and where they stand on an axis: metrics and dimensions in, scales out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cnn_tuning.config import Choice, Dimension, label_of, levels_of
from cnn_tuning.reports.plots import PALE

NAMES = {
    "val/accuracy": "validation accuracy",
    "val/loss": "validation loss",
    "time/train_seconds": "training time",
    "cost/usd": "cost",
    "model/parameters": "parameters of the network",
}
# What a person would write on an axis that is stretched towards 100 %, the first ones first.
_SHARES = (
    0.9,
    0.99,
    0.5,
    0.95,
    0.98,
    0.999,
    0.1,
    0.8,
    0.995,
    0.97,
    0.7,
    0.998,
    0.96,
    0.3,
    0.2,
    0.6,
    0.9995,
    0.4,
    1.0,
)
_RESOLUTION = 1e-3
# As a share of the axis: nearer, ticks' texts would touch each other in a small picture.
_APART = 0.13


@dataclass(frozen=True)
class Scale:
    """An axis: `place` puts a value on it, from `low` to `high`; `ticks` are (place, text)."""

    name: str
    place: Callable[[Any], float]
    ticks: Sequence[tuple[float, str]]
    low: float
    high: float

    def part(self, value: Any) -> float:
        """Return where a value stands between the ends, 0 to 1; in the middle where they are one place."""
        if self.high <= self.low:
            return 0.5
        return (self.place(value) - self.low) / (self.high - self.low)


def show(metric: str, value: float) -> str:
    """Return a value of an objective as a person reads it."""
    if metric == "val/accuracy":
        return f"{value:.2%}"
    if metric == "cost/usd":
        return f"${value:.2f}" if abs(value) >= 10 else f"${value:.3g}"
    if metric == "time/train_seconds":
        return f"{value:.0f} s" if abs(value) >= 100 else f"{value:.3g} s"
    return f"{value:,.0f}" if metric == "model/parameters" else f"{value:.4f}"


def dollars(usd: float, *, signed: bool = False) -> str:
    """Return an amount without its sign of currency, with two digits that mean something."""
    small = 1e-9 < abs(usd) < 1
    digits = min(8, 1 - math.floor(math.log10(abs(usd)))) if small else 2
    return f"{usd:{'+' if signed else ''},.{digits}f}"


def show_gain(metric: str, gain: float) -> str:
    """Return a difference of two values without its sign."""
    return f"{100 * abs(gain):.2f} points" if metric == "val/accuracy" else show(metric, abs(gain))


def show_parameter(value: Any) -> str:
    """Return a sampled value with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else label_of(value)


def short_names(dotted: Iterable[str]) -> dict[str, str]:
    """Return a name for each dotted name that is as short as it can be without being another's."""
    found: dict[str, str] = {}
    names = list(dotted)
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            if sum(other.split(".")[-count:] == parts[-count:] for other in names) == 1:
                break
        found[name] = " ".join(parts[-count:]).replace("_", " ")
    return found


def metric_scale(metric: str, values: Sequence[float]) -> Scale:
    """Return the axis of an objective over all `values`; accuracies far apart are stretched towards 100 %."""
    name, (low, high) = NAMES[metric], _ends(metric, values)
    if metric == "val/accuracy" and 1 - low > 6 * (1 - high) and high - low > 0.05:
        spare = max((1 - high) / 2, _RESOLUTION)
        return _scale(name, lambda v: -math.log10(1 - v + spare), low, high, _SHARES, lambda v: f"{v:.4g}", 100)
    if metric == "val/accuracy":
        return _linear(f"{name}, %", low, min(high, 1.0), 100)
    unit = {"cost/usd": ", $", "time/train_seconds": ", s"}.get(metric, "")
    return _logarithmic(name + unit, low, high) if 0 < 5 * low < high else _linear(name + unit, low, high)


def dimension_scale(name: str, dimension: Dimension, values: Iterable[Any] = ()) -> Scale:
    """Return the axis of a dimension from end to end and over all `values`, or with a place for each choice."""
    if isinstance(dimension, Choice):
        labels = list(levels_of(dimension.choices))
        ticks = [(float(i), label if len(label) < 14 else f"{label[:12]}…") for i, label in enumerate(labels)]
        return Scale(name, lambda v: float(labels.index(label_of(v))), ticks, -0.5, len(labels) - 0.5)
    seen = [dimension.low, dimension.high, *values]
    low, high = min(seen), max(seen)
    if low == high:
        return _linear(name, low - 1, high + 1)
    return (
        _logarithmic(name, low, high) if dimension.log else _linear(name, low, high, whole=dimension.kind == "int")
    )


def rule(axes: Any, side: str, scale: Scale, *, named: bool = True) -> None:
    """Put a scale on the x or y side of a plot, with a little room at its ends."""
    room = 0.05 * (scale.high - scale.low)
    axis = axes.xaxis if side == "x" else axes.yaxis
    texts = [text for _, text in scale.ticks]
    axis.set_ticks([place for place, _ in scale.ticks], texts)
    columns = axes.get_subplotspec().get_gridspec().ncols
    if side == "x" and sum(len(text) + 1 for text in texts) > 110 / columns:
        axes.tick_params(axis="x", rotation=25)
    axis.set_label_text(scale.name if named else "")
    (axes.set_xlim if side == "x" else axes.set_ylim)(scale.low - room, scale.high + room)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


def _ends(metric: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    about = 0.005 if metric == "val/accuracy" else abs(low) * 0.05 or 1.0
    return low - about, high + about


def _linear(name: str, low: float, high: float, factor: float = 1, *, whole: bool = False) -> Scale:
    from matplotlib.ticker import MaxNLocator

    candidates = MaxNLocator(5, integer=whole).tick_values(factor * low, factor * high)
    inside = [v for v in candidates if factor * low - 1e-9 <= v <= factor * high + 1e-9]
    step = float(min((b - a for a, b in pairwise(candidates)), default=1.0))
    digits = max(0, math.ceil(-math.log10(step) - 1e-9)) if step < 1 else 0
    digits += round(step * 10**digits, 6) % 1 > 0
    return Scale(name, float, [(v / factor, f"{v:,.{digits}f}") for v in inside], low, high)


def _logarithmic(name: str, low: float, high: float) -> Scale:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_ones = [first * 10.0**k for first in (1, 3, 2, 5, 7, 4, 6, 8, 9, 1.5) for k in decades]
    return _scale(name, math.log10, low, high, round_ones, _plain)


def _plain(value: float) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:,.5g}"
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _scale(
    name: str,
    place: Callable[[float], float],
    low: float,
    high: float,
    candidates: Iterable[float],
    text: Callable[[float], str],
    factor: float = 1,
) -> Scale:
    """Return a scale with those candidates that stand far enough from the ones before, or evenly spaced ticks."""
    start, end = place(low), place(high)
    chosen: list[tuple[float, str]] = []
    for value in candidates:
        where = place(value) if low * (1 - 1e-9) <= value <= high * (1 + 1e-9) else math.inf
        if math.isfinite(where) and all(abs(where - other) > _APART * (end - start) for other, _ in chosen):
            chosen.append((where, text(factor * value)))
    unit = ", %" if factor == 100 else ""
    if len(chosen) < 2:
        even = _linear(name, low, high, factor)
        chosen = [(place(where), written) for where, written in even.ticks]
    return Scale(name + unit, place, sorted(chosen), start, end)
