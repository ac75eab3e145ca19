"""`cnn-tuning diagnose` and `cnn-tuning cure`: a recorded training in, findings or the proof of a remedy out.

A cure is an ablation of two arms, the training as it was and with the remedy: its trainings are kept with those
of the ablations, its comparison and verdict are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import (
    DiagnosisConfig,
    QuestionConfig,
    Recipe,
    TrackingConfig,
    compose_sections,
    patch,
    side_by_side,
)
from cnn_tuning.diagnosis.findings import Finding, patch_text
from cnn_tuning.errors import UserError

if TYPE_CHECKING:
    from cnn_tuning.ablation.outcome import Result

AS_IT_WAS, WITH_REMEDY = "as it was", "with the remedy"


@dataclass(frozen=True)
class Needed:
    """The sections that these commands read."""

    diagnosis: DiagnosisConfig
    tracking: TrackingConfig


def diagnose_run(run: str, overrides: Sequence[str], data: Path, *, as_json: bool) -> None:
    """Print what the rules find in a recorded training."""
    from cnn_tuning.reports.findings import print_findings

    _, _, findings = _judged(run, overrides, data)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(run, findings)


def cure_run(
    run: str, overrides: Sequence[str], data: Path, out: Path, *, rule: str | None, seeds: int, workers: int
) -> None:
    """Train with and without a finding's remedy, and print what can be concluded."""
    from cnn_tuning.ablation.outcome import write_outcome
    from cnn_tuning.ablation.settle import settle
    from cnn_tuning.ablation.train import jobs_for
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.tracking.run import Run

    config, recipe, findings = _judged(run, overrides, data)
    finding = _chosen(findings, rule)
    click.echo(f"{finding.rule}: {finding.explanation}")
    click.echo(f"remedy: {patch_text(finding)}")
    before = side_by_side(recipe, workers)
    arms = {AS_IT_WAS: before, WITH_REMEDY: patch(before, finding.remedy, "remedy")}
    jobs = jobs_for(f"cure {finding.rule}", arms, recipe.seed, seeds)
    question = QuestionConfig(
        question=f"Does the remedy for {finding.rule} help ({patch_text(finding)})?",
        factors={"arm": list(arms)},
        reference=AS_IT_WAS,
    )
    packed = PackedData.open(data)
    folder = out / finding.rule
    params = {f"remedy.{name}": value for name, value in finding.remedy.items()}
    with Run.start(config.tracking, name=f"cure {finding.rule}", kind="cure", params=params) as tracked:
        results = settle(
            jobs, packed, Path(".state/arms"), tracking=config.tracking, tracked=tracked, workers=workers,
            diagnosis=config.diagnosis,
        )  # fmt: skip
        outcome = write_outcome(folder, "cure", question, results, confidence=0.95)
        tracked.log_metrics(outcome.metrics())
        for file in sorted(folder.iterdir()):
            tracked.log_artifact(file, "cure")
    click.echo(_firings(finding.rule, results))
    for sentence in outcome.verdicts:
        click.echo(sentence)
    click.echo(f"tables and pictures: {folder}")


def _firings(rule: str, results: Sequence[Result]) -> str:
    """Say on how many trainings of each arm the rule fires: the finding itself, before what it may lead to."""
    counts = []
    for arm in (AS_IT_WAS, WITH_REMEDY):
        own = [result for result in results if result.arm == arm]
        counts.append(f"on {sum(rule in result.findings for result in own)} of {len(own)} {arm}")
    return f"{rule} fires {counts[0]}, {counts[1]}"


def _judged(run: str, overrides: Sequence[str], data: Path) -> tuple[Needed, Recipe, list[Finding]]:
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.diagnosis.judge import check_rules, diagnose
    from cnn_tuning.diagnosis.source import find

    config = compose_sections(Needed, overrides)
    check_rules(config.diagnosis)
    training = find(run, config.tracking)
    packed = PackedData.open(data) if (data / "meta.json").exists() else None
    _, findings = diagnose(training.recording, config.diagnosis, training.recipe, packed)
    return config, training.recipe, findings


def _chosen(findings: Sequence[Finding], rule: str | None) -> Finding:
    """Return the finding to cure."""
    fired = {finding.rule: finding for finding in findings if finding.status == "fired"}
    curable = [name for name, finding in fired.items() if finding.remedy]
    if rule is None and curable:
        return fired[curable[0]]
    if rule is None or rule not in fired:
        what = f"the rule {rule!r} has not fired" if rule else "no rule with a remedy has fired"
        raise UserError(f"{what}; those that have: {', '.join(fired) or 'none'}")
    if rule not in curable:
        raise UserError(f"{rule} has no remedy in the configuration: {fired[rule].advice}")
    return fired[rule]
