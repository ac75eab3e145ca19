"""Judge the recorded trainings by the rules of the day: `python -m cnn_tuning.stages.diagnose`.

Nothing is trained but, where a learning rate is in doubt, the hundred steps of a range test: other thresholds cost
seconds. `results/diagnosis/` has the findings of the baseline and, where there was a search, of the tuned
model, and `metrics.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import click

from cnn_tuning.config import DiagnosisConfig
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.stages.lineage import prepared_data


@dataclass(frozen=True)
class DiagnoseConfig:
    """The sections that this stage reads."""

    diagnosis: DiagnosisConfig


def run(config: DiagnoseConfig, place: Place) -> None:
    """Judge each model's recording."""
    from cnn_tuning.diagnosis.findings import line, metrics_of, write_findings
    from cnn_tuning.diagnosis.judge import diagnose
    from cnn_tuning.diagnosis.source import training_in

    out = place.outputs / place.diagnosis
    empty_folder(out)
    metrics: dict[str, Any] = {}
    data = prepared_data(place)
    for name, model, sheet in (
        ("baseline", place.top / place.baseline, place.top / place.training),
        ("tuned", place.beside_baseline(place.tuned), place.beside_baseline(place.refit)),
    ):
        if name == "tuned" and not (model / "recording").exists():
            continue
        training = training_in(model, sheet)
        _, findings = diagnose(training.recording, config.diagnosis, training.recipe, data)
        (out / name).mkdir()
        write_findings(out / name / "findings.json", findings)
        metrics[name] = metrics_of(findings)
        for finding in findings:
            if finding.status == "fired":
                click.echo(f"{name}: {line(finding)}")
        counts = metrics[name]
        unknown = f"{counts['not_evaluated']} could not be judged"
        click.echo(f"{name}: {counts['fired']} of {len(findings)} rules fired, {unknown}")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    stage(DiagnoseConfig, run, "Judge the recorded trainings by the rules, with evidence and remedies.")
