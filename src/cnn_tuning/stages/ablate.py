"""Settle the ablation's questions on the validation split: `python -m cnn_tuning.stages.ablate [ablation=…]`.

`results/ablation/` has a folder a question (runs, arms, comparisons, verdicts, plots), `metrics.json` and
`report.html`. Trainings that were made before, by whatever question, are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cnn_tuning.config import (
    AblationConfig,
    DiagnosisConfig,
    QuestionConfig,
    Recipe,
    TrackingConfig,
    recipe_of,
    to_plain,
)
from cnn_tuning.stages.command import Place, empty_folder, gather_plots, stage
from cnn_tuning.stages.lineage import prepared_data, record_data, recorded
from cnn_tuning.tracking.run import Run

if TYPE_CHECKING:
    from cnn_tuning.ablation.outcome import Outcome


@dataclass(frozen=True)
class AblateConfig(Recipe):
    """The sections that this stage reads."""

    ablation: AblationConfig
    diagnosis: DiagnosisConfig
    tracking: TrackingConfig


def run(config: AblateConfig, place: Place) -> None:
    """Train the arms of every question, compare them, and write what follows."""
    out = place.outputs / place.ablation
    empty_folder(out)
    questions = config.ablation.questions
    if not questions:
        (out / "metrics.json").write_text("{}\n")
        gather_plots(out)
        click.echo("no ablation in this experiment (ablation: none)")
        return
    from cnn_tuning.training.resume import Interrupted

    outcomes: list[Outcome] = []
    try:
        for name, question in questions.items():
            _settle(config, place, name, question, outcomes)
    except Interrupted as stopped:
        click.echo(str(stopped), err=True)
        raise
    metrics: dict[str, Any] = {}
    for outcome in outcomes:
        for metric, value in outcome.metrics().items():
            _nest(metrics, metric.split("/"), value)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    gather_plots(out)
    click.echo(f"report: {out / 'report.html'}")


def _settle(config: AblateConfig, place: Place, name: str, question: QuestionConfig, known: list[Outcome]) -> None:
    """Settle a question, add what came of it to what is known, and write the page on all of it."""
    from cnn_tuning.ablation.outcome import write_outcome
    from cnn_tuning.ablation.settle import settle
    from cnn_tuning.ablation.train import begun, jobs_of, missing
    from cnn_tuning.reports.ablation import write_report

    data, page = prepared_data(place), place.outputs / place.ablation / "report.html"
    out = page.with_name(name)
    workers = config.ablation.workers
    jobs = jobs_of(name, question, recipe_of(config), workers)
    kept = place.outputs / place.state / "arms"
    params = recorded(to_plain(recipe_of(config)) | {"ablation": to_plain(question)}, place)
    goes_on = begun(jobs, data, kept) > 0
    with Run.start(
        config.tracking, name=f"ablate {name}", kind="ablate", params=params, goes_on=goes_on
    ) as tracked:
        record_data(tracked, place, data, "val")
        made = len(jobs) - missing(jobs, data, kept)
        click.echo(f"ablate {name}: {len(jobs)} trainings, {made} of them known", err=True)
        results = settle(
            jobs,
            data,
            kept,
            workers=workers,
            diagnosis=config.diagnosis,
            tracking=config.tracking,
            tracked=tracked,
        )
        outcome = write_outcome(out, name, question, results, config.ablation.confidence)
        tracked.log_metrics(outcome.metrics())
        known.append(outcome)
        write_report(page, known, _facts(config, place))
        for file in [*sorted(out.iterdir()), page]:
            tracked.log_artifact(file, "ablation")
    for sentence in (out / "verdicts.txt").read_text().splitlines():
        click.echo(f"{name}: {sentence}")
    for sentence in outcome.costs:
        click.echo(f"{name}: {sentence}")


def _nest(tree: dict[str, Any], path: list[str], value: float) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _facts(config: AblateConfig, place: Place) -> Mapping[str, str]:
    meta = prepared_data(place).meta
    return {
        "data": f"{meta.name}, {sum(meta.counts['train']):,} images to learn from, {sum(meta.counts['val']):,} "
        "validation images; the test split was not opened",
        "data digest": meta.digest,
        "network": config.model.name,
        "first seed": str(config.seed),
    }


if __name__ == "__main__":
    stage(AblateConfig, run, "Train the arms of the ablations and say what can be concluded from them.")
