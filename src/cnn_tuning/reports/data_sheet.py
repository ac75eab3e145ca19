"""The data sheet of prepared data: `Meta` or `PackedData` come in, PNG files and a text go out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnn_tuning.data.packed import Meta, PackedData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"train": "#3b6ea5", "val": "#e0a030", "test": "#7a9e5f"}
_INK = "#333333"
_MOST_CLASSES = 100


def sheet(meta: Meta, rejected: int, *, stand_in: bool = False) -> str:
    """Return what the data is in Markdown: sizes of splits, of an image, and all classes, the largest first.

    `stand_in`: the pictures are drawn, which the first line then says.
    """
    total = {split: sum(counts) for split, counts in meta.counts.items()}
    channels, height, width = meta.shape
    sizes = sorted(meta.counts["train"])
    lines = [f"# {meta.name}", ""]
    if stand_in:
        lines += ["**A stand-in: drawn pictures. Results on them say nothing about the real data.**", ""]
    lines += [
        f"{sum(total.values()):,} images: " + ", ".join(f"{n:,} {split}" for split, n in total.items()) + "; "
        f"{len(meta.classes)} classes; {rejected:,} bad images left out.",
        f"An image is {height}×{width}×{channels} = {height * width * channels:,} values, "
        f"mean {_vector(meta.mean)}, standard deviation {_vector(meta.std)} (training split).",
        f"A class has {sizes[0]:,} to {sizes[-1]:,} training images; the largest has "
        f"{sizes[-1] / max(1, sizes[0]):.1f} times as many as the smallest.",
        "",
        "| | class | " + " | ".join(meta.counts) + " |",
        "|---" * (2 + len(meta.counts)) + "|",
    ]
    for place, index in enumerate(by_size(meta), 1):
        counts = " | ".join(str(values[index]) for values in meta.counts.values())
        lines.append(f"| {place} | {meta.classes[index].replace('|', '&#124;')} | {counts} |")
    return "\n".join(lines) + "\n"


def by_size(meta: Meta) -> list[int]:
    """Return the classes' indices, those with most training images first."""
    return sorted(range(len(meta.classes)), key=lambda index: -meta.counts["train"][index])


def _vector(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def class_distribution(meta: Meta, path: Path) -> None:
    """Draw how many images each class has, by split; over 12 by size, over 100 the largest and smallest fifty."""
    from matplotlib.figure import Figure

    counts = {split: np.array(values) for split, values in meta.counts.items()}
    flat = len(meta.classes) <= 12
    order = np.arange(len(meta.classes)) if flat else np.array(by_size(meta))
    if len(order) > _MOST_CLASSES:
        order = np.concatenate([order[: _MOST_CLASSES // 2], order[-_MOST_CLASSES // 2 :]])
    figure = Figure(figsize=(8, 4.2) if flat else (8, 1.6 + 0.22 * len(order)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, [meta.classes[i] for i in order], {s: v[order] for s, v in counts.items()}, flat=flat)
    total = " + ".join(f"{v.sum():,} {split}" for split, v in counts.items())
    smallest, largest = counts["train"].min(), counts["train"].max()
    axes.set_title(
        f"{meta.name}: {total} images, {len(meta.classes)} classes (train: {smallest:,} to {largest:,} a class)",
        fontsize=10, color=_INK, loc="left", parse_math=False,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, names: list[str], counts: dict[str, np.ndarray], *, flat: bool) -> None:
    places = np.arange(len(names))
    width = 0.8 / len(counts)
    for place, (split, values) in enumerate(counts.items()):
        offset = (place - (len(counts) - 1) / 2) * width
        if flat:
            axes.bar(places + offset, values, width, label=split, color=_COLOURS[split])
        else:
            axes.barh(places + offset, values, width, label=split, color=_COLOURS[split])
    shown = [_short(name, 18) for name in names]
    if flat:
        axes.set_xticks(places, shown, rotation=30 if max(map(len, shown)) > 6 else 0, parse_math=False)
        axes.set_ylabel("images")
    else:
        axes.set_yticks(places, shown, fontsize=8, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("images")
        axes.margins(y=0.01)
    axes.grid(axis="y" if flat else "x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if flat:
        axes.legend(frameon=False, ncols=len(counts), loc="upper right", fontsize=9)
        axes.set_ylim(0, max(v.max() for v in counts.values()) * 1.18)
    else:
        axes.figure.legend(frameon=False, ncols=len(counts), loc="outside lower right", fontsize=9)


def image_grid(data: PackedData, path: Path, seed: int) -> None:
    """Draw random training images as the network sees them, a row a class (of over 20, twenty drawn ones)."""
    from matplotlib.figure import Figure

    meta = data.meta
    channels, height, width = meta.shape
    canvas, classes = _mosaic(data, seed)
    figure = Figure(figsize=(9, 0.5 + 8.4 * canvas.shape[0] / canvas.shape[1]), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    middles = (np.arange(len(classes)) + 0.5) * canvas.shape[0] / len(classes)
    names = [_short(meta.classes[i], 14) for i in classes]
    axes.set_yticks(middles, names, fontsize=9, color=_INK, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{meta.name}: training images as the network sees them, {height}×{width}×{channels}",
        fontsize=10, color=_INK, loc="left", parse_math=False,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _mosaic(data: PackedData, seed: int, columns: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return one picture of all the images drawn, and the class of each row."""
    split, meta = data.split("train"), data.meta
    rng = np.random.default_rng(seed)
    classes = np.arange(len(meta.classes))
    if len(classes) > 20:
        classes = np.sort(rng.choice(classes, 20, replace=False))
    channels, height, width = meta.shape
    gap = max(1, height // 14)
    canvas = np.full((len(classes) * (height + gap), columns * (width + gap), channels), 255, np.uint8)
    for row, label in enumerate(classes):
        members = np.flatnonzero(split.labels == label)
        for column, index in enumerate(rng.choice(members, min(columns, len(members)), replace=False)):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = split.images[index].transpose(1, 2, 0)
    return canvas, classes


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
