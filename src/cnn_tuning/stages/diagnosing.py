"""`cnn-tuning diagnose` and `cnn-tuning cure`: a recorded training in, findings or the proof of a remedy out.

A cure is an ablation of two arms, the training as it was and with the remedy: its trainings are kept with those
of the ablations, its comparison and verdict are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
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
from cnn_tuning.diagnosis.findings import Finding, findings_json, patch_text
from cnn_tuning.errors import UserError
from cnn_tuning.statistics import mean_interval

if TYPE_CHECKING:
    from cnn_tuning.ablation.outcome import Result
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.diagnosis.recording import Recording

AS_IT_WAS, WITH_REMEDY = "as it was", "with the remedy"


@dataclass(frozen=True)
class Needed:
    """The sections that these commands read."""

    diagnosis: DiagnosisConfig
    tracking: TrackingConfig


def diagnose_run(run: str, overrides: Sequence[str], data: Path, *, as_json: bool) -> None:
    """Print what the rules find in a recorded training."""
    from cnn_tuning.reports.findings import print_findings

    _, _, findings, _ = _judged(run, overrides, data)
    if as_json:
        click.echo(findings_json(findings))
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

    config, recipe, findings, same = _judged(run, overrides, data)
    finding = _chosen(findings, rule)
    if not same:
        raise UserError(f"{data} is not what {run} was trained on: prepare that experiment's data first")
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
    click.echo(_seconds(results))
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


def _seconds(results: Sequence[Result]) -> str:
    """Say how much longer or shorter a training takes: what remedies of the profiler's rules are for."""
    by_arm = {arm: {r.seed: r.seconds for r in results if r.arm == arm} for arm in (AS_IT_WAS, WITH_REMEDY)}
    before, after = by_arm.values()
    more = [after[seed] - before[seed] for seed in before]
    interval = mean_interval(more, 0.95)
    bounds = f" [{interval.low:+.1f}, {interval.high:+.1f}]" if interval else ""
    return f"a training takes {mean(before.values()):.1f} s as it was, {mean(more):+.1f} s{bounds} with the remedy"


def _judged(run: str, overrides: Sequence[str], data: Path) -> tuple[Needed, Recipe, list[Finding], bool]:
    """Return what the rules find, and whether the prepared data are those of the training.

    Other data would mislead a range test, and a cure: they are left alone.
    """
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.diagnosis.judge import check_rules, diagnose
    from cnn_tuning.diagnosis.source import find

    config = compose_sections(Needed, overrides)
    check_rules(config.diagnosis)
    training = find(run, config.tracking)
    packed = PackedData.open(data) if (data / "meta.json").exists() else None
    same = packed is not None and _trained_on(packed, training.recording)
    _, findings = diagnose(training.recording, config.diagnosis, training.recipe, packed if same else None)
    return config, training.recipe, findings, same


def _trained_on(packed: PackedData, recording: Recording) -> bool:
    """Return whether a recording is of these prepared data: by their digest, and by labels and counts if known."""
    import numpy as np

    known, digest = recording.data, recording.curves.data_digest
    if digest and digest != packed.meta.digest:
        return False
    return known is None or (
        known.classes == tuple(packed.meta.classes)
        and np.array_equal(known.counts, packed.meta.counts["train"])
        and np.array_equal(known.labels, packed.split("val").labels)
    )


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
