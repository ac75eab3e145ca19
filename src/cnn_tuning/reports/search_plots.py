"""Pictures of a search: its trials as plain values in, PNG files out, and a sentence for each that is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_tuning.reports import parameter_plots
from cnn_tuning.reports.parameter_plots import FAILED, WIDTH
from cnn_tuning.reports.plots import ACCENT, INK, SECOND, new_figure, save
from cnn_tuning.reports.scales import Scale, metric_scale, rule
from cnn_tuning.reports.search_view import SearchView, Trial

OTHER = "#9fb0bd"


def draw(view: SearchView, folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Draw what makes sense; return (caption, PNG) of each picture, and why each other one is left out."""
    drawn: list[tuple[str, Path]] = []
    left_out: list[str] = []
    for stem, (caption, picture) in PICTURES.items():
        out = folder / f"{stem}.png"
        reason = picture(view, out)
        if reason:
            left_out.append(f"{caption.partition(':')[0]}: {reason}.")
        elif out.exists():
            drawn.append((caption, out))
    return drawn, left_out


def history(view: SearchView, out: Path) -> str:
    """Draw the value of each trial in order, and the best so far."""
    if not any(trial.values or trial.curve for trial in view.trials):
        return "no trial came to a value"
    figure, grid = new_figure(WIDTH, 3.6 * len(view.directions), rows=len(view.directions))
    for axes, metric in zip(np.atleast_1d(grid), view.directions, strict=True):
        pruned = [t for t in view.trials if t.state == "pruned" and t.curve and len(view.directions) == 1]
        last = {t.index: t.curve[-1][1] for t in pruned}
        scale = metric_scale(metric, [t.values[metric] for t in view.complete] + list(last.values()))
        rule(axes, "y", scale)
        steps, best = _best_so_far(view, metric)
        if len(view.directions) == 1 and best:
            end = max(trial.index for trial in view.trials)
            axes.step([*steps, end], [scale.place(v) for v in [*best, best[-1]]], where="post", color=INK,
                      linewidth=1, label="best so far")  # fmt: skip
        several = len(view.directions) > 1
        shown = [
            (t.index, scale.place(t.values[metric])) for t in view.complete if not several or t not in view.front
        ]
        _dots(axes, shown, "o", OTHER if several else ACCENT, "complete")
        if several:
            shown = [(t.index, scale.place(t.values[metric])) for t in view.front]
            _dots(axes, shown, "o", ACCENT, "complete, on the Pareto front")
        _dots(axes, [(t.index, scale.place(last[t.index])) for t in pruned], "v", SECOND, "pruned, its last value")
        failed = [(t.index, 0.0) for t in view.trials if t.state == "failed"]
        _dots(axes, failed, "x", FAILED, "failed", clip_on=False, transform=axes.get_xaxis_transform())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("trial")
    _legend(figure, axes)
    save(figure, out)
    return ""


def curves(view: SearchView, out: Path) -> str:
    """Draw the value of each trial after each epoch; pruned ones end in a triangle."""
    shown = [trial for trial in view.trials if trial.curve]
    if len(view.directions) > 1:
        return "with several objectives no trial is compared while it runs"
    if not any(len(trial.curve) > 1 for trial in shown):
        return f"no trial reported values of more than one {view.curve_step}"
    figure, axes = new_figure(WIDTH, 4.4)
    scale = metric_scale(view.main, [value for trial in shown for _, value in trial.curve])
    rule(axes, "y", scale)
    seen: set[str] = set()
    for trial in sorted(shown, key=lambda t: t.state == "pruned"):
        colour, label, style = _stroke(view, trial)
        steps, places = [s for s, _ in trial.curve], [scale.place(v) for _, v in trial.curve]
        axes.plot(steps, places, color=colour, label=None if label in seen else label, **style)
        seen.add(label)
        end = {"pruned": "v", "failed": "x"}.get(trial.state)
        if end:
            axes.plot(steps[-1], places[-1], end, color=colour, markersize=5, zorder=4)
    axes.set_xlabel(view.curve_step)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    save(figure, out)
    return ""


def pareto(view: SearchView, out: Path) -> str:
    """Draw each other objective against the first, with the front."""
    if len(view.directions) < 2:
        return ""
    if not view.complete:
        return "no trial is complete"
    first, *others = view.directions
    figure, grid = new_figure(WIDTH, 4.4, columns=len(others))
    y = view.metric_scale(first)
    for axes, metric in zip(np.atleast_1d(grid), others, strict=True):
        x = view.metric_scale(metric)
        rule(axes, "x", x)
        rule(axes, "y", y)
        spot = {t.index: (x.place(t.values[metric]), y.place(t.values[first])) for t in view.complete}
        front = sorted(spot[t.index] for t in view.front)
        label = "no other is better in both" if len(others) == 1 else "on the front of all"
        _dots(axes, [s for s in spot.values() if s not in front], "o", OTHER, "other complete trials")
        if len(others) == 1:
            axes.plot(*zip(*front, strict=True), drawstyle=_corner(view, metric, first), color=ACCENT, linewidth=1)
        _dots(axes, front, "o", ACCENT, label)
        if view.own in view.complete and view.own is not None:
            axes.plot(*spot[view.own.index], "D", markersize=10, fillstyle="none", color=INK,
                      label="the experiment's own values")  # fmt: skip
        _number(axes, [(t.index, *spot[t.index]) for t in view.front], x, y)
        axes.set_title("Numbers: trials on the front", loc="left")
    _legend(figure, axes)
    save(figure, out)
    return ""


PICTURES: dict[str, tuple[str, Callable[[SearchView, Path], str]]] = {
    "history": ("History: every trial, and the best so far", history),
    "pareto": ("Pareto front", pareto),
    "intermediate": ("Curves: what the pruner saw", curves),
    "importance": ("Importance of the parameters", parameter_plots.importance),
    "parallel": ("Parallel coordinates", parameter_plots.parallel),
    "slice": ("Slices: the result over each parameter", parameter_plots.slices),
    "contour": ("Contour: the result over the two most important parameters", parameter_plots.contour),
}


def _stroke(view: SearchView, trial: Trial) -> tuple[str, str, dict[str, Any]]:
    """Return colour, name and further style of a trial's curve."""
    if trial is view.best:
        own = ", the experiment's own values" if trial is view.own else ""
        return ACCENT, f"trial {trial.index}: the best{own}", {"linewidth": 2.6, "zorder": 5}
    if trial is view.own:
        return INK, f"trial {trial.index}: the experiment's own values", {"linestyle": "--"}
    colours = {"complete": ACCENT, "pruned": SECOND, "failed": FAILED}
    return colours[trial.state], trial.state, {"linewidth": 1, "alpha": 0.55, "zorder": 2}


def _dots(
    axes: Any, spots: Sequence[tuple[float, float]], marker: str, colour: str, label: str, **more: Any
) -> None:
    if spots:
        axes.plot(*zip(*spots, strict=True), marker, color=colour, label=label, markersize=5.5, zorder=3, **more)


def _legend(figure: Any, axes: Any) -> None:
    """Put the legend below, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="outside lower center")


def _best_so_far(view: SearchView, metric: str) -> tuple[list[int], list[float]]:
    ordered = sorted(view.complete, key=lambda trial: trial.index)
    values = [trial.values[metric] for trial in ordered]
    return [t.index for t in ordered], [view.better(metric, values[: i + 1]) for i in range(len(values))]


def _corner(view: SearchView, x: str, y: str) -> str:
    """Return how the line of a front turns, so that it encloses what is not reached."""
    return "steps-post" if view.directions[x] == "minimize" else "steps-pre"


def _number(axes: Any, spots: Sequence[tuple[int, float, float]], x: Scale, y: Scale) -> None:
    """Write trials' numbers beside their dots, where there is room for one."""
    taken: list[tuple[float, float]] = []
    for index, left, height in spots:
        part = ((left - x.low) / (x.high - x.low), (height - y.low) / (y.high - y.low))
        if all(abs(part[0] - a) > 0.05 or abs(part[1] - b) > 0.06 for a, b in taken):
            axes.annotate(str(index), (left, height), (5, 5), textcoords="offset points", fontsize=8)
            taken.append(part)
