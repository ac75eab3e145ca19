"""Plots of one evaluation as PNG: tables that `train` and `evaluate` wrote in, pictures out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK, ACCENT, SECOND, PALE = "#22303c", "#1f6fb4", "#d9772b", "#d5dde3"
# Above this number of classes a cell's figure would no longer be readable.
MOST_CELLS_WITH_TEXT = 25


def learning_curves(history: Path, out: Path) -> None:
    """Draw loss and error of training and validation over epochs from `history.csv`."""
    with history.open() as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure, (left, right) = new_figure(9.5, 3.6, columns=2)
    for split, colour in (("train", ACCENT), ("val", SECOND)):
        loss = [float(row[f"{split}/loss"]) for row in rows]
        error = [100 * (1 - float(row[f"{split}/accuracy"])) for row in rows]
        left.plot(epochs, loss, "o-", color=colour, label=split, markersize=4)
        right.plot(epochs, error, "o-", color=colour, label=split, markersize=4)
    left.set(title="Loss after each epoch", xlabel="epoch", ylabel="cross-entropy")
    right.set(title="Error after each epoch", xlabel="epoch", ylabel="wrong answers, %")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        axes.grid(color=PALE, linewidth=0.6)
    save(figure, out)


def confusion_matrix(confusion: NDArray[np.int64], classes: Sequence[str], out: Path) -> None:
    """Draw which class was taken for which: shares of each true class by colour, counts in figures."""
    count = len(classes)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 3.2 + 0.42 * count if count <= MOST_CELLS_WITH_TEXT else 6.5
    figure, axes = new_figure(side + 0.6, side)
    # The fourth root lets a single mistake in a thousand be seen beside the diagonal.
    image = axes.imshow(share**0.25, cmap="Blues", vmin=0, vmax=1)
    axes.set(title="Confusion matrix, test split", xlabel="answered", ylabel="true class")
    if count <= MOST_CELLS_WITH_TEXT:
        names = [short(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=0 if max(map(len, names)) < 4 else 60, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        for i, j in np.argwhere(confusion > 0):
            dark = share[i, j] ** 0.25 > 0.6
            axes.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=8,
                      color="white" if dark else INK)  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.75, ticks=[0, 0.01**0.25, 0.1**0.25, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "100 %"])
    bar.set_label("share of the true class")
    save(figure, out)


def calibration(table: Path, confidence: float, out: Path) -> None:
    """Draw from `calibration.csv` how often answers of a confidence were right, and how many there were."""
    figure, (top, bottom) = new_figure(5.2, 5.6, rows=2, heights=(3, 1))
    with table.open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    stated, counts = [row["confidence"] for row in rows], [row["images"] for row in rows]
    accuracy = [row["accuracy"] for row in rows]
    below = [row["accuracy"] - row["low"] for row in rows]
    above = [row["high"] - row["accuracy"] for row in rows]
    top.plot([0, 1], [0, 1], color=PALE, linewidth=1.5, zorder=0)
    top.errorbar(stated, accuracy, (below, above), fmt="o", color=ACCENT, markersize=5, elinewidth=1)
    top.text(0.99, 0.03, f"bars: {100 * confidence:g} % Wilson intervals", ha="right", fontsize=8)
    top.set(title="Calibration, test split", ylabel="share right", xlim=(0, 1.01), ylim=(0, 1.03))
    top.grid(color=PALE, linewidth=0.6)
    bottom.bar(stated, counts, width=0.03, color=ACCENT)
    bottom.set(xlabel="confidence of the answer", ylabel="images", yscale="log", xlim=(0, 1.01))
    save(figure, out)


def mistakes(pairs: Sequence[Sequence[NDArray[np.uint8]]], captions: Sequence[str], total: int, out: Path) -> None:
    """Draw wrongly classified pictures (each a row of H×W×3 arrays) with a caption over each."""
    columns = 4 if pairs else 1
    rows = max(1, -(-len(pairs) // columns))
    figure, grid = new_figure(9.5, 0.8 + 1.5 * rows, rows=rows, columns=columns)
    cells = np.atleast_1d(np.asarray(grid, dtype=object)).ravel()
    for axes in cells:
        axes.axis("off")
    for axes, pair, caption in zip(cells, pairs, captions, strict=False):
        gap = np.full((pair[0].shape[0], max(1, pair[0].shape[1] // 14), 3), 255, np.uint8)
        row = [part for picture in pair for part in (picture, gap)][:-1]
        axes.imshow(np.concatenate(row, axis=1), interpolation="nearest")
        axes.set_title(caption, fontsize=8, color=INK, parse_math=False)
    shown = f"the {len(pairs)} most confident of {total}" if len(pairs) < total else f"all {total}"
    figure.suptitle(f"Mistakes on the test split: {shown}" if total else "No mistakes on the test split")
    save(figure, out)


def answer(picture: NDArray[np.uint8], labels: Sequence[str], probabilities: Sequence[float], out: Path) -> None:
    """Draw a picture (H×W or H×W×3) beside the most probable classes, the first one on top."""
    figure, (left, right) = new_figure(6.5, 2.4, columns=2)
    left.imshow(picture, cmap="gray", interpolation="nearest")
    left.axis("off")
    places = range(len(labels))
    right.barh(places, [100 * p for p in probabilities], color=[ACCENT] + [PALE] * (len(labels) - 1), height=0.6)
    for place, probability in zip(places, probabilities, strict=True):
        right.text(100 * probability + 1, place, f"{probability:.1%}", va="center")
    right.set_yticks(places, [short(label) for label in labels], parse_math=False, fontsize=11)
    right.invert_yaxis()
    right.set(title="The answer", xlabel="probability, %", xlim=(0, 118), xticks=range(0, 101, 25))
    right.spines[["top", "right"]].set_visible(False)
    save(figure, out)


def as_colours(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture C×H×W of one or three channels as H×W×3."""
    return np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a picture (C×H×W) under its heat (H×W in [0, 1]) as H×W×3: the hotter, the less of the picture."""
    import matplotlib

    # Not the palest end of the colours, which would not be seen on white.
    colours = matplotlib.colormaps["inferno"](0.85 * heat)[..., :3]
    share = 0.8 * heat[..., None]
    return np.rint(as_colours(image) * (1 - share) + 255 * colours * share).astype(np.uint8)


def short(name: str, most: int = 18) -> str:
    """Return a name of at most so many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.edgecolor": PALE, "text.color": INK, "axes.titlesize": 10})
    return plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        layout="constrained",
        gridspec_kw={"height_ratios": heights} if heights else None,
    )


def save(figure: Any, out: Path) -> None:
    import matplotlib.pyplot as plt

    # Without the date of writing, equal content is equal bytes.
    figure.savefig(out, dpi=130, metadata={"Software": None})
    plt.close(figure)
