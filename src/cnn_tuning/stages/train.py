"""Fit the baseline to `models/baseline/`: `python -m cnn_tuning.stages.train [trainer.max_epochs=1 …]`.

Times, rates, findings and the profile go to `results/training/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cnn_tuning.config import DiagnosisConfig, Recipe, TrackingConfig, recipe_of, to_plain
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.stages.lineage import prepared_data, record_data, recorded, stopping
from cnn_tuning.tracking.run import Run


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """The sections that this stage reads."""

    diagnosis: DiagnosisConfig
    tracking: TrackingConfig


def run(config: TrainConfig, place: Place, kind: str = "train") -> None:
    """Fit, and keep the best network with its history; `kind` is that of its run."""
    recipe = recipe_of(config)
    out, sheet = place.outputs / place.baseline, place.outputs / place.training
    for folder in (out, sheet):
        empty_folder(folder)
    name = f"{kind} {config.model.name} seed {config.seed}"
    params = recorded(to_plain(recipe) | stopping(config.diagnosis), place)
    unfinished = any((place.outputs / place.state / "train").glob("*/checkpoints.json"))
    with Run.start(config.tracking, name=name, kind=kind, params=params, goes_on=unfinished) as tracked:
        _fit(config, place, out, sheet, tracked)


def _fit(config: TrainConfig, place: Place, out: Path, sheet: Path, tracked: Run) -> None:
    # Imported here: torch and Lightning take seconds that `--help` and a bad path need not wait for.
    from cnn_tuning.reports.profile import PROFILE
    from cnn_tuning.stages.fitting import fit_to_folder
    from cnn_tuning.training.resume import Interrupted

    data = prepared_data(place)
    record_data(tracked, place, data, "train")
    state = place.outputs / place.state / "train"
    recipe, diagnosis = recipe_of(config), config.diagnosis
    try:
        fitted = fit_to_folder(
            recipe, data, out, sheet, diagnosis=diagnosis, state=state, tracked=tracked, name="train"
        )
    except Interrupted as stopped:
        click.echo(str(stopped), err=True)
        raise
    fitted.state.remove()
    best = fitted.best
    click.echo(
        f"{out}: epoch {best['epoch']} of {len(fitted.history)}, val/accuracy {best['val/accuracy']:.4f}, "
        f"{fitted.seconds['train']:.1f} s, {fitted.samples_per_second:,.0f} samples/s on {fitted.device}; "
        f"profile: {sheet / PROFILE}"
    )


if __name__ == "__main__":
    stage(TrainConfig, run, "Fit the baseline network and keep the best epoch's weights.")
