"""Pictures of a search's parameters: a view of it in, PNG files out; each returns why it is left out, or ""."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cnn_tuning.config import Choice, Dimension
from cnn_tuning.reports.plots import ACCENT, INK, PALE, SECOND, new_figure, save
from cnn_tuning.reports.scales import NAMES, rule, short_names
from cnn_tuning.reports.search_view import SearchView, Trial

FAILED = "#b03a2e"
WIDTH = 9.5
COLOURS = "viridis_r"
# Of more parameters than these, pictures show the most important ones.
MOST_PARAMETERS = 12
# Of fewer trials, colours between them would be guesses.
FEWEST_FOR_SURFACE = 8


def importance(view: SearchView, out: Path) -> str:
    """Draw the importances of each objective; why there are none is said with their evaluation."""
    known = {metric: weights for metric, weights in view.importances.items() if weights}
    if not known:
        return ""
    most = max(len(weights) for weights in known.values())
    figure, grid = new_figure(WIDTH, 1.1 + 0.32 * most, columns=len(known))
    names = short_names(view.space)
    for axes, (metric, weights) in zip(np.atleast_1d(grid), known.items(), strict=True):
        ordered = sorted(weights.items(), key=lambda item: item[1])
        bars = axes.barh([names[n] for n, _ in ordered], [100 * w for _, w in ordered], 0.6, color=ACCENT)
        axes.bar_label(bars, [f"{w:.0%}" for _, w in ordered], padding=3)
        axes.set(xlim=(0, 112), xlabel="share, %")
        axes.set_title(f"Importance for the {NAMES[metric]}", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, out)
    return ""


def parallel(view: SearchView, out: Path) -> str:
    """Draw each complete trial as a line through its values and its result."""
    names = view.varied()[:MOST_PARAMETERS]
    if len(view.complete) < 2 or not names:
        return "it needs two complete trials with different values"
    figure, axes = new_figure(max(WIDTH, 1.0 * len(names)), 4.6)
    result = view.metric_scale(view.main)
    scales = [*(view.scale(name) for name in names), result]
    missing = any(name not in trial.parameters for trial in view.complete for name in names)
    for trial in sorted(view.complete, key=lambda t: _goodness(view, t)):
        places = [s.part(trial.parameters[n]) if n in trial.parameters else -0.12
                  for n, s in zip(names, scales, strict=False)]  # fmt: skip
        places.append(result.part(trial.values[view.main]))
        best = trial is view.best
        axes.plot(range(len(scales)), places, color=_colour(_goodness(view, trial)), alpha=1 if best else 0.75,
                  linewidth=3 if best else 1.1)  # fmt: skip
    paper = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}
    for place, scale in enumerate(scales):
        side = 1 if scale is result else -1
        axes.axvline(place, color=INK, linewidth=0.8)
        for where, text in scale.ticks:
            part = (where - scale.low) / (scale.high - scale.low)
            axes.plot([place, place + side * 0.02], [part, part], color=INK, linewidth=0.8)
            axes.text(place + side * 0.04, part, text, ha="left" if side > 0 else "right", va="center", fontsize=8,
                      bbox=paper)  # fmt: skip
    if missing:
        axes.axhline(-0.12, color=PALE, linewidth=0.8, zorder=0)
        axes.text(-0.04, -0.12, "not used", ha="right", va="center", fontsize=8, bbox=paper | {"alpha": 1})
    axes.set_xticks(range(len(scales)), [_wrapped(scale.name) for scale in scales])
    axes.set(ylim=(-0.17 if missing else -0.03, 1.03), yticks=[], xlim=(-0.45, len(scales) - 0.7))
    axes.set_title("A line is a complete trial, the thick one the best; dark is better", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, out)
    return ""


def slices(view: SearchView, out: Path) -> str:
    """Draw the result over each parameter alone; ticks below mark trials without a result."""
    names = view.varied()[:MOST_PARAMETERS]
    if len(view.complete) < 2 or not names:
        return "it needs two complete trials with different values"
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure, grid = new_figure(WIDTH, 0.3 + 2.7 * rows, rows=rows, columns=columns)
    result = view.metric_scale(view.main)
    cells = np.atleast_1d(np.asarray(grid, dtype=object)).ravel()
    for axes in cells[len(names) :]:
        axes.axis("off")
    for number, (axes, name) in enumerate(zip(cells, names, strict=False)):
        scale = view.scale(name)
        rule(axes, "x", scale)
        rule(axes, "y", result, named=number % columns == 0)
        for trial in view.trials:
            if name not in trial.parameters:
                continue
            x = scale.place(trial.parameters[name]) + _aside(view.space[name], trial.index)
            if trial.state == "complete":
                y, best = result.place(trial.values[view.main]), trial is view.best
                axes.plot(x, y, "*" if best else "o", color=SECOND if best else ACCENT, alpha=1 if best else 0.7,
                          markersize=13 if best else 5, markeredgewidth=0, zorder=3 + best)  # fmt: skip
            else:
                mark, colour = ("x", FAILED) if trial.state == "failed" else ("|", SECOND)
                axes.plot(x, 0.02, mark, color=colour, markersize=5, transform=axes.get_xaxis_transform())
    figure.suptitle("Star: the best; marks at the bottom: pruned | and failed ×", fontsize=10, x=0.01, ha="left")
    save(figure, out)
    return ""


def contour(view: SearchView, out: Path) -> str:
    """Draw the result over the two most important parameters."""
    names = view.varied()[:2]
    shown = [trial for trial in view.complete if all(name in trial.parameters for name in names)]
    if len(names) < 2 or len(shown) < 3:
        return "it needs three complete trials in which two parameters vary"
    figure, axes = new_figure(WIDTH, 4.8)
    (x, y), result = [view.scale(name) for name in names], view.metric_scale(view.main)
    points = np.array([[s.part(t.parameters[n]) for n, s in zip(names, (x, y), strict=True)] for t in shown])
    heights = np.array([result.place(trial.values[view.main]) for trial in shown])
    colours: dict[str, Any] = {"cmap": _map(view), "vmin": result.low, "vmax": result.high}
    continuous = not any(isinstance(view.space[name], Choice) for name in names)
    if continuous and len(shown) >= FEWEST_FOR_SURFACE:
        surface = _surface(points, heights)
        axes.imshow(surface, extent=(x.low, x.high, y.low, y.high), origin="lower", aspect="auto",
                    interpolation="bilinear", alpha=0.85, **colours)  # fmt: skip
    rule(axes, "x", x)
    rule(axes, "y", y)
    aside = [[_aside(view.space[n], t.index + 3 * i) for i, n in enumerate(names)] for t in shown]
    spots = np.array([[s.place(t.parameters[n]) for n, s in zip(names, (x, y), strict=True)] for t in shown])
    spots += aside
    dots = axes.scatter(*spots.T, c=heights, edgecolors="white", linewidths=0.8, s=42, zorder=3, **colours)
    if view.best in shown:
        axes.plot(
            *spots[shown.index(view.best)], "*", color=SECOND, markersize=15, markeredgecolor="white", zorder=4
        )
    bar = figure.colorbar(dots, ax=axes, ticks=[place for place, _ in result.ticks])
    bar.ax.set_yticklabels([text for _, text in result.ticks])
    bar.set_label(result.name)
    bar.outline.set_visible(False)
    about = "; colour: the mean of trials nearby" if continuous and len(shown) >= FEWEST_FOR_SURFACE else ""
    axes.set_title(f"Complete trials by two parameters; star: the best{about}", loc="left")
    save(figure, out)
    return ""


def _goodness(view: SearchView, trial: Trial) -> float:
    """Return where a complete trial stands between the worst, 0, and the best, 1."""
    part = view.metric_scale(view.main).part(trial.values[view.main])
    return part if view.directions[view.main] == "maximize" else 1 - part


def _map(view: SearchView) -> str:
    return COLOURS if view.directions[view.main] == "maximize" else COLOURS.removesuffix("_r")


def _colour(goodness: float) -> Any:
    import matplotlib

    return matplotlib.colormaps[COLOURS](goodness)


def _aside(dimension: Dimension, index: int) -> float:
    """Return how far a dot moves sideways, so that dots of one choice do not cover each other."""
    return 0.3 * ((index * 0.618034) % 1 - 0.5) if isinstance(dimension, Choice) else 0.0


def _surface(points: np.ndarray, heights: np.ndarray, cells: int = 240, reach: float = 0.12) -> np.ndarray:
    """Return the mean of the trials around each cell of the unit square, weighted by nearness; NaN: none near.

    The kernel regression of Nadaraya and Watson: unlike triangles it needs no general position, and it shows
    no ridge between two trials that differ by chance.
    """
    middles = (np.arange(cells) + 0.5) / cells
    grid = np.stack(np.meshgrid(middles, middles), axis=-1)[:, :, None, :]
    squares = ((grid - points) ** 2).sum(-1)
    weights = np.exp(-squares / (2 * reach**2))
    surface = (weights * heights).sum(-1) / np.maximum(weights.sum(-1), 1e-12)
    surface[squares.min(-1) > (1.5 * reach) ** 2] = math.nan
    return surface


def _wrapped(name: str) -> str:
    """Return a name on lines of at most about 12 letters."""
    lines = [""]
    for word in name.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 13 else [lines[-1], word]
    return "\n".join(line for line in lines if line)
