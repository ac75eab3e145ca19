"""Pack `data/raw/` into uint8 splits in `data/prepared/`: `python -m cnn_tuning.stages.preprocess`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from cnn_tuning.config import DataConfig, TrackingConfig, flatten, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.reports.data_sheet import class_distribution, image_grid
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.tracking.run import Run


@dataclass(frozen=True)
class PreprocessConfig:
    """The sections that this stage reads."""

    seed: int
    data: DataConfig
    tracking: TrackingConfig


def run(config: PreprocessConfig, place: Place) -> None:
    """Prepare the splits, and log what they look like."""
    out = place.outputs / place.prepared
    sheet = place.outputs / "results/data"
    empty_folder(sheet)
    params = flatten({"seed": config.seed, "data": to_plain(config.data)})
    with Run.start(config.tracking, name=f"preprocess {config.data.name}", kind="preprocess", params=params) as r:
        meta = prepare(config.data, place.input(place.raw), out, seed=config.seed)
        class_distribution(meta, sheet / "classes.png")
        image_grid(PackedData.open(out), sheet / "images.png", config.seed)
        counts = {split: sum(counts) for split, counts in meta.counts.items()}
        r.log_dataset(name=meta.name, digest=meta.digest, source=str(place.prepared), split="all")
        r.log_metrics({f"data/{split}_images": float(n) for split, n in counts.items()})
        for file in (sheet / "classes.png", sheet / "images.png", out / "meta.json", out / "rejected.csv"):
            r.log_artifact(file, "data")
    click.echo(f"{out}: {meta.name}, " + ", ".join(f"{n:,} {split}" for split, n in counts.items()))


if __name__ == "__main__":
    stage(PreprocessConfig, run, "Pack the fetched files into training, validation and test splits.")
