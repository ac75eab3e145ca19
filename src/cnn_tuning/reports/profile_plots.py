"""Plots of a profile as PNG: `Times` in, pictures out, narrow enough to be read on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.recording import Times
from cnn_tuning.reports.plots import ACCENT, INK, PALE, SECOND, new_figure, save

WIDTH = 5.6
# More steps than this are drawn as medians of their neighbours, and the slow ones each.
MOST_POINTS = 2000
MOST_EPOCHS = 40
PERCENTILES = (50, 90, 99, 100)


def step_times(times: Times, slow: NDArray[np.bool_], epoch_steps: Sequence[int], out: Path) -> None:
    """Draw the milliseconds of each step with percentiles; `slow` steps are marked, ends of epochs are lines."""
    figure, axes = new_figure(WIDTH, 3.2)
    step = times.first_step + np.arange(len(times.step))
    taken = 1000 * times.step
    if len(epoch_steps) <= MOST_EPOCHS:
        for end in epoch_steps:
            axes.axvline(end + 0.5, color=PALE, linewidth=0.7, zorder=0)
    others, width = ~slow, -(-len(step) // MOST_POINTS)
    at, of_step = step[others], taken[others]
    if width > 1:
        bins = np.arange(0, len(at), width)
        at = at[bins]
        of_step = np.array([np.median(of_step[start : start + width]) for start in bins])
    label = "a step" if width == 1 else f"median of {width} steps"
    axes.plot(at, of_step, ".", color=ACCENT, markersize=3, label=label)
    if slow.any():
        axes.plot(step[slow], taken[slow], "D", color=SECOND, markersize=4, label="far slower than the median")
    for percent in PERCENTILES[:-1]:
        value = float(np.percentile(taken, percent))
        axes.axhline(value, color=INK, linewidth=0.7, linestyle="--" if percent == 50 else ":", zorder=1)
        axes.annotate(f"p{percent}", (1.01, value), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    if taken.max() > 8 * np.median(taken):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel="milliseconds")
    if slow.any() or width > 1:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save(figure, out)


def utilisation(times: Times, out: Path) -> None:
    """Draw what the run used over time: a panel each for processor, memory, disk and GPU, as far as sampled."""
    panels = [panel for panel in _PANELS if any(np.isfinite(column).any() for column, _, _ in panel(times)[2])]
    figure, grid = new_figure(WIDTH, 0.5 + 1.35 * len(panels), rows=len(panels))
    for axes, panel in zip(np.atleast_1d(np.asarray(grid, dtype=object)), panels, strict=True):
        title, top, columns = panel(times)
        for column, colour, label in columns:
            if np.isfinite(column).any():
                axes.plot(times.system_at, column, color=colour, linewidth=1.4, label=label)
        axes.axvspan(0, times.initialisation, color=PALE, alpha=0.5, linewidth=0)
        axes.set_ylim(0, top)
        axes.set_xlim(0, times.total)
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(color=PALE, linewidth=0.6)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, borderpad=0)
        axes.label_outer()
    axes.set_xlabel("seconds since the start (grey: initialisation)")
    save(figure, out)


Panel = tuple[str, float | None, list[tuple[Any, str, str]]]


def _cpu(times: Times) -> Panel:
    columns = [(times.machine_cpu, SECOND, "all processes"), (times.cpu, ACCENT, "this run")]
    return f"CPU, % of {times.cores} cores", 105, columns


def _memory(times: Times) -> Panel:
    return "memory of the run, MB", _headroom(times.memory / 1e6), [(times.memory / 1e6, ACCENT, "memory")]


def _disk(times: Times) -> Panel:
    read, written = times.disk_read / 1e6, times.disk_write / 1e6
    top = max(_headroom(read) or 1, _headroom(written) or 1, 1.0)
    return "disk, MB/s", top, [(written, SECOND, "written"), (read, ACCENT, "read")]


def _gpu(times: Times) -> Panel:
    return "GPU, %", 105, [(times.gpu, ACCENT, "busy")]


def _gpu_memory(times: Times) -> Panel:
    total = times.gpu_memory_total / 1e9
    title = f"GPU memory, GB of {total:.0f}" if total else "GPU memory, GB"
    return title, total or None, [(times.gpu_memory / 1e9, ACCENT, "memory")]


def _headroom(column: NDArray[Any]) -> float | None:
    return 1.15 * float(np.nanmax(column)) or None if np.isfinite(column).any() else None


_PANELS: tuple[Callable[[Times], Panel], ...] = (_cpu, _memory, _disk, _gpu, _gpu_memory)
