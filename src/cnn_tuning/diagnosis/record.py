"""A training, its recording and findings in; folders and a run from which `source` finds it again out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cnn_tuning.config import Recipe, to_plain
from cnn_tuning.diagnosis.findings import Finding, tags_of, write_findings
from cnn_tuning.diagnosis.recording import RECIPE, Recording, write_recording, write_sheet
from cnn_tuning.tracking.run import Run


def record_training(
    tracked: Run, model: Path, sheet: Path, recipe: Recipe, recording: Recording, findings: Sequence[Finding]
) -> None:
    """Write recipe and recording to `model`, times and range test to `sheet`; log both, and the findings."""
    write_recording(recording, model / "recording")
    (model / RECIPE).write_text(json.dumps(to_plain(recipe), indent=2) + "\n")
    write_sheet(recording, sheet)
    tracked.set_tags(tags_of(findings))
    written = sorted(sheet.iterdir())
    # What a kill leaves there is removed with the output by the next start.
    with tempfile.TemporaryDirectory(dir=sheet) as scratch:
        told = Path(scratch, "findings.json")
        write_findings(told, findings)
        for file in (told, *written):
            tracked.log_artifact(file, "diagnosis")
    for file in sorted(model.iterdir()):
        tracked.log_artifact(file, "model")
