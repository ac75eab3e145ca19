"""Search, and refit the best to `models/tuned/`: `python -m cnn_tuning.stages.tune [search=lab …]`.

`results/search/` holds the trials, the best values, importances and plots. An interrupted search goes on with
the trials that are missing. The refit follows the experiment's own recipe (all epochs) with the best values;
its first seed is the experiment's, and that model is the tuned one: no seed is chosen by its result.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from cnn_tuning.config import (
    DiagnosisConfig,
    Recipe,
    SearchConfig,
    TrackingConfig,
    changes_of,
    flatten,
    patch,
    recipe_of,
    to_plain,
)
from cnn_tuning.errors import UserError
from cnn_tuning.stages.command import Place, empty_folder, gather_plots, stage
from cnn_tuning.stages.lineage import prepared_data, record_data, recorded, stopping
from cnn_tuning.tracking.run import Run


@dataclass(frozen=True)
class TuneConfig(Recipe):
    """The sections that this stage reads."""

    search: SearchConfig
    diagnosis: DiagnosisConfig
    tracking: TrackingConfig


def run(config: TuneConfig, place: Place) -> None:
    """Search the space, write what was found, and refit the best."""
    out, model = place.outputs / place.search, place.outputs / place.tuned
    for folder in (out, model):
        empty_folder(folder)
    if not config.search.space:
        (out / "metrics.json").write_text("{}\n")
        gather_plots(out)
        click.echo("no search in this experiment (search: none): the baseline is what is evaluated")
        return
    from cnn_tuning.training.resume import Interrupted

    recipe = recipe_of(config)
    own = to_plain(recipe) | {"search": to_plain(config.search)} | stopping(config.diagnosis)
    params = recorded(own, place)
    try:
        with Run.start(
            config.tracking,
            name=f"tune {config.search.name}",
            kind="tune",
            params=params,
            goes_on=_is_begun(config, recipe, place),
        ) as tracked:
            best = _search(config, recipe, place, out, tracked)
            _refit(config, patch(recipe, best), place, model, out, tracked)
            for file in sorted(out.iterdir()):
                tracked.log_artifact(file, "search")
            gather_plots(out)
    except Interrupted as stopped:
        click.echo(str(stopped), err=True)
        raise


def _is_begun(config: TuneConfig, recipe: Recipe, place: Place) -> bool:
    """Return whether the study of this very search is there: a run of it that was cut off then goes on."""
    folder = place.outputs / place.state / "search"
    if not folder.is_dir():
        return False
    from cnn_tuning.search.question import question_of, study_name
    from cnn_tuning.search.storage import open_storage
    from cnn_tuning.training.resume import code_digest

    price = config.tracking.price_per_hour
    question = question_of(config.search, recipe, prepared_data(place).meta.digest, code_digest(), price)
    name = study_name(config.search, question)
    try:
        studies = open_storage(config.search.storage, folder).get_all_studies()
    except UserError:  # the search says so itself
        return False
    return any(study.study_name == name for study in studies)


def _search(config: TuneConfig, recipe: Recipe, place: Place, out: Path, tracked: Run) -> dict[str, Any]:
    """Return the best trial's changes: dotted name → value."""
    from cnn_tuning.search.outcome import write_outcome
    from cnn_tuning.search.sweep import run_search

    data = prepared_data(place)
    record_data(tracked, place, data, "train")
    study = run_search(
        config.search,
        recipe,
        data.path,
        place.outputs / place.state / "search",
        diagnosis=config.diagnosis,
        tracked=tracked,
        tracking=config.tracking,
    )
    outcome = write_outcome(out, study, config.search, recipe, config.tracking.price_per_hour)
    tracked.log_metrics(outcome.metrics())
    tracked.set_tags(outcome.tags())
    click.echo(" ".join(filter(None, (outcome.sentence, outcome.caveat))))
    return changes_of(config.search, outcome.best_params)


def _refit(config: TuneConfig, recipe: Recipe, place: Place, model: Path, out: Path, tracked: Run) -> None:
    from cnn_tuning.stages.fitting import fit_to_folder

    data = prepared_data(place)
    rows, states = [], []
    for number in range(config.search.refit_seeds):
        seeded = patch(recipe, {"seed": recipe.seed + number})
        name = f"refit seed {seeded.seed}"
        folder = model if number == 0 else place.outputs / place.state / "refit" / str(seeded.seed)
        sheet = place.outputs / place.refit if number == 0 else folder.with_name(f"{seeded.seed} sheet")
        for needed in (folder, sheet) if number else (sheet,):
            empty_folder(needed)
        params = flatten(to_plain(seeded) | stopping(config.diagnosis))
        kept = place.outputs / place.state / "tuned" / str(seeded.seed)
        with Run.start(
            config.tracking,
            name=name,
            kind="refit",
            params=params,
            parent=tracked.key,
            waits=False,
            goes_on=any(kept.glob("*/checkpoints.json")),
        ) as refit:
            fitted = fit_to_folder(
                seeded,
                data,
                folder,
                sheet,
                diagnosis=config.diagnosis,
                state=kept,
                tracked=refit,
                name=name,
            )
        rows.append({"seed": seeded.seed, **_figures(fitted.best), "seconds": round(fitted.seconds["fit"], 2)})
        states.append(fitted.state)
    with (out / "refit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for state in states:
        state.remove()
    values = [float(row["val/accuracy"]) for row in rows]
    tracked.log_metrics({"refit/val_accuracy": mean(values)})
    click.echo(f"{model}: refitted on the full budget, {_accuracy(values, sum(data.meta.counts['val']))}")


def _accuracy(values: Sequence[float], images: int) -> str:
    """Say what the refitted model (the first) reaches, with an interval over images, and the spread over seeds."""
    from cnn_tuning.statistics import share_interval

    found = share_interval(round(values[0] * images), images, 0.95)
    spread = f"; {mean(values):.2%} ± {stdev(values):.2%} over {len(values)} seeds" if len(values) > 1 else ""
    return (
        f"val/accuracy {found.value:.2%} of {images:,} images (95 % interval {found.low:.2%} to {found.high:.2%}, "
        f"another seed may differ by more){spread}"
    )


def _figures(best: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in best.items()
        if name in ("epoch", "train/accuracy", "val/accuracy", "val/loss")
    }


if __name__ == "__main__":
    stage(TuneConfig, run, "Search for better values than the experiment's own, and refit the best.")
