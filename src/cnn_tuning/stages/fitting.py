"""Fit one recipe and write what came of it: used by `train`, and by `tune` for the refit of its best.

A model's folder holds only what the recipe, the data and the code decide, so that the same inputs give the
same bytes; times, rates and the profile go to the `sheet`'s folder. Findings are told and logged, and left to
the stage `diagnose`: a changed rule trains nothing again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cnn_tuning.config import DiagnosisConfig, Recipe
from cnn_tuning.data.packed import PackedData
from cnn_tuning.diagnosis.findings import Finding, line
from cnn_tuning.diagnosis.judge import diagnose
from cnn_tuning.diagnosis.record import record_training
from cnn_tuning.diagnosis.trace import Operator, Tracer
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.models import bundle
from cnn_tuning.reports.profile import PROFILE, write_profile
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.fit import Diverged, Fitted, fit


def fit_to_folder(
    recipe: Recipe,
    data: PackedData,
    out: Path,
    sheet: Path,
    *,
    diagnosis: DiagnosisConfig,
    state: Path,
    tracked: Run,
    name: str,
) -> Fitted:
    """Fit, write the best network with its history to the existing folder `out`, diagnose and record it all.

    The existing folder `sheet` gets what differs from one run to the next: `training.json`, `times.npz`,
    `profile.html`, and the trace where one is asked for.

    Raises:
        Interrupted: a signal came; the state is saved below `state`.
        Diverged: the loss is no longer finite; what was recorded and its findings are written.
    """
    watch = Watch(recipe, diagnosis, name)
    tracer = Tracer(sheet) if recipe.trainer.profile else None
    callbacks = [*watch.callbacks, *([tracer] if tracer else [])]
    try:
        fitted = fit(recipe, data, state_folder=state, log=tracked.log_metrics, callbacks=callbacks, name=name)
    except Diverged:
        recording, findings = diagnose(watch.broken_off(tracked.system_samples()), diagnosis, recipe, data)
        write_profile(sheet / PROFILE, recording, findings, operators=_operators(tracer), title=name)
        _tell(findings, name)
        record_training(tracked, out, sheet, recipe, recording, findings)
        raise
    recording, findings = diagnose(
        watch.conclude(fitted, data, tracked.system_samples()), diagnosis, fitted.recipe, data
    )
    _write_model(out, fitted)
    facts = _facts(fitted, tracked, watch.stopped_by)
    (sheet / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    tracked.set_tags({k: str(v) for k, v in facts.items() if k not in ("run", "seconds", "samples_per_second")})
    seconds = {f"time/{k}_seconds": v for k, v in fitted.seconds.items()}
    tracked.log_metrics({**seconds, "time/samples_per_second": fitted.samples_per_second})
    # The last epoch's figures are not those of the network that is kept.
    kept = {"best/val_accuracy": fitted.best["val/accuracy"], "val/images": float(sum(data.meta.counts["val"]))}
    tracked.log_metrics(kept)
    write_profile(sheet / PROFILE, recording, findings, operators=_operators(tracer), title=name)
    _tell(findings, name)
    record_training(tracked, out, sheet, fitted.recipe, recording, findings)
    return fitted


def _operators(tracer: Tracer | None) -> list[Operator] | None:
    return tracer.operators if tracer else None


def _tell(findings: Sequence[Finding], name: str) -> None:
    for finding in findings:
        if finding.status == "fired":
            click.echo(f"{name}: {line(finding)}")


def _write_model(out: Path, fitted: Fitted) -> None:
    bundle.save(out, fitted.network, fitted.specification)
    _write_history(out / "history.csv", fitted.history)
    (out / "best.json").write_text(json.dumps(fitted.best, indent=2) + "\n")
    (out / "layers.txt").write_text(fitted.layers + "\n")


def _facts(fitted: Fitted, tracked: Run, stopped_by: str) -> dict[str, Any]:
    return {
        "run": tracked.key,
        "seconds": {name: round(value, 2) for name, value in fitted.seconds.items()},
        "samples_per_second": round(fitted.samples_per_second),
        "device": fitted.device,
        "precision": fitted.precision,
        "threads": fitted.threads,
        "processes": fitted.processes,
        "batch_size": fitted.recipe.trainer.batch_size,
        "resumed_from_step": fitted.resumed_from,
        **({"stopped_by": stopped_by} if stopped_by else {}),
    }


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
