"""A training of several that is over: judged, and its recording, findings and profile brought to its run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cnn_tuning.config import DiagnosisConfig, Recipe
from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.judge import diagnose
from cnn_tuning.diagnosis.record import record_training
from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.reports.profile import PROFILE, write_profile
from cnn_tuning.tracking.run import Run


def judge_and_record(
    tracked: Run, folder: Path, recipe: Recipe, recording: Recording, config: DiagnosisConfig, name: str
) -> list[Finding]:
    """Log what was recorded and found of the training `name`; what passes through goes to `folder`."""
    recording, findings = diagnose(recording, config)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model, sheet = Path(scratch, "model"), Path(scratch, "sheet")
        model.mkdir()
        sheet.mkdir()
        write_profile(sheet / PROFILE, recording, findings, title=name)
        record_training(tracked, model, sheet, recipe, recording, findings)
    return findings
