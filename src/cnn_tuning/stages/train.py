"""Fit the baseline to `models/baseline/`: `python -m cnn_tuning.stages.train [trainer.max_epochs=1 …]`.

`models/baseline/` holds only what the recipe, the data and the code decide, so that the same inputs give
the same bytes; times and rates go to `results/training/`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cnn_tuning.config import Recipe, TrackingConfig, recipe_of, to_plain
from cnn_tuning.errors import UserError
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.stages.lineage import data_hash, recorded
from cnn_tuning.tracking.run import Run


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """The sections that this stage reads."""

    tracking: TrackingConfig


def run(config: TrainConfig, place: Place) -> None:
    """Fit, and keep the best network with its history."""
    recipe = recipe_of(config)
    out, sheet = place.outputs / place.baseline, place.outputs / place.training
    for folder in (out, sheet):
        empty_folder(folder)
    name = f"train {config.model.name} seed {config.seed}"
    params = recorded(to_plain(recipe), place)
    with Run.start(config.tracking, name=name, kind="train", params=params) as tracked:
        _fit(recipe, place, out, sheet, tracked)


def _fit(recipe: Recipe, place: Place, out: Path, sheet: Path, tracked: Run) -> None:
    # Imported here: torch and Lightning take seconds that `--help` and a bad path need not wait for.
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.models import bundle
    from cnn_tuning.training.fit import fit
    from cnn_tuning.training.resume import Interrupted

    data = PackedData.open(place.input(place.prepared))
    if place.data_name not in (None, data.meta.name):
        raise UserError(
            f"{data.path} holds {data.meta.name}, not {place.data_name}: run the stages fetch and preprocess "
            f"with data={place.data_name}, then this one with --inputs {place.outputs}"
        )
    source = str(data.path)
    digest = data_hash(place.prepared) if place.is_pipeline else data.meta.digest
    tracked.log_dataset(name=data.meta.name, digest=digest, source=source, split="train")

    def log(metrics: Mapping[str, float], step: int) -> None:
        tracked.log_metrics(metrics, step)

    try:
        fitted = fit(recipe, data, state_folder=place.outputs / place.state / "train", log=log)
    except Interrupted as stopped:
        click.echo(str(stopped), err=True)
        raise
    bundle.save(out, fitted.network, fitted.specification)
    _write_history(out / "history.csv", fitted.history)
    (out / "recipe.json").write_text(json.dumps(to_plain(recipe), indent=2) + "\n")
    (out / "best.json").write_text(json.dumps(fitted.best, indent=2) + "\n")
    (out / "layers.txt").write_text(fitted.layers + "\n")
    facts = {
        "run": tracked.key,
        "seconds": {name: round(value, 2) for name, value in fitted.seconds.items()},
        "samples_per_second": round(fitted.samples_per_second),
        "device": fitted.device,
        "precision": fitted.precision,
        "threads": fitted.threads,
        "resumed_from_step": fitted.resumed_from,
    }
    (sheet / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    tracked.set_tags({k: str(facts[k]) for k in ("device", "precision", "threads", "resumed_from_step")})
    fitted.state.remove()
    seconds = {f"time/{k}_seconds": v for k, v in fitted.seconds.items()}
    tracked.log_metrics({**seconds, "time/samples_per_second": fitted.samples_per_second})
    for file in sorted(out.iterdir()):
        tracked.log_artifact(file, "model")
    best = fitted.best
    click.echo(
        f"{out}: epoch {best['epoch']} of {len(fitted.history)}, val/accuracy {best['val/accuracy']:.4f}, "
        f"{fitted.seconds['train']:.1f} s, {fitted.samples_per_second:,.0f} samples/s on {fitted.device}"
    )


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


if __name__ == "__main__":
    stage(TrainConfig, run, "Fit the baseline network and keep the best epoch's weights.")
