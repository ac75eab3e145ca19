"""Pack `data/raw/` into uint8 splits in `data/prepared/`: `python -m cnn_tuning.stages.preprocess`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import click

from cnn_tuning.config import DataConfig, TrackingConfig, flatten, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.stand_in import is_stand_in
from cnn_tuning.reports.data_sheet import by_size, class_distribution, image_grid, sheet
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.tracking.run import Run

_FEW = 10


@dataclass(frozen=True)
class PreprocessConfig:
    """The sections that this stage reads."""

    seed: int
    data: DataConfig
    tracking: TrackingConfig


def run(config: PreprocessConfig, place: Place) -> None:
    """Prepare the splits, and log what they look like."""
    out = place.outputs / place.prepared
    folder = place.outputs / "results/data"
    empty_folder(folder)
    raw = place.input(place.raw)
    drawn = any(is_stand_in(raw / name) for name in config.data.files)
    if drawn:
        warning = "is a stand-in: drawn pictures, results on them say nothing about the real data"
        click.echo(f"preprocess: {config.data.name} {warning}", err=True)
    params = flatten({"seed": config.seed, "data": to_plain(config.data)})
    with Run.start(config.tracking, name=f"preprocess {config.data.name}", kind="preprocess", params=params) as r:
        meta = prepare(config.data, raw, out, seed=config.seed, refused=folder / "rejected.csv")
        class_distribution(meta, folder / "classes.png")
        image_grid(PackedData.open(out), folder / "images.png", config.seed)
        text = sheet(meta, _rejected(out / "rejected.csv"), stand_in=drawn)
        (folder / "sheet.md").write_text(text, encoding="utf-8")
        counts = {split: sum(counts) for split, counts in meta.counts.items()}
        r.log_dataset(name=meta.name, digest=meta.digest, source=str(place.prepared), split="all")
        r.log_metrics({f"data/{split}_images": float(n) for split, n in counts.items()})
        pictures = folder / "classes.png", folder / "images.png"
        for file in (folder / "sheet.md", *pictures, out / "meta.json", out / "rejected.csv"):
            r.log_artifact(file, "data")
    click.echo(f"{out}: {meta.name}, " + ", ".join(f"{n:,} {split}" for split, n in counts.items()))
    if len(meta.classes) > _FEW:
        largest = (f"{meta.classes[i]} {meta.counts['train'][i]:,}" for i in by_size(meta)[:_FEW])
        click.echo(f"{folder / 'sheet.md'}: {len(meta.classes)} classes, the largest: {', '.join(largest)}")


def _rejected(path: Path) -> int:
    with path.open(newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.reader(file)) - 1


if __name__ == "__main__":
    stage(PreprocessConfig, run, "Pack the fetched files into training, validation and test splits.")
