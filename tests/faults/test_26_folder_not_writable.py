"""Row 26: an output folder that cannot be written is named before any work is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

# Root writes everywhere, unless it gives that up.
PLAIN = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"] if os.geteuid() == 0 else []


@pytest.mark.parametrize(
    ("stage", "folder", "own"),
    [
        ("fetch", "data/raw", "data/raw"),
        ("preprocess", "data", "data/prepared"),
        ("train", "models", "models/baseline"),
        ("train", "results", "results/training"),
        ("train", ".state", ".state"),
        ("tune", "models", "models/tuned"),
        ("evaluate", "results", "results/evaluation"),
    ],
)
def test_26_a_stage_names_the_folder_and_stops(digits, tmp_path, stage, folder, own):
    """`own` is what the stage would write there; the rest of the folder may be what it reads."""
    project = tmp_path / "project"
    shutil.copytree(digits.path, project, ignore=shutil.ignore_patterns(".dvc", "mlflow.db"))
    shutil.rmtree(project / own, ignore_errors=True)
    (project / folder).mkdir(exist_ok=True)
    (project / folder).chmod(0o500)
    refused = subprocess.run([*PLAIN, "touch", str(project / folder / "probe")], capture_output=True)
    assert refused.returncode  # the fault is real
    done = subprocess.run(
        [*PLAIN, sys.executable, "-m", f"cnn_tuning.stages.{stage}", "--locked"],
        cwd=project,
        env=digits.environment,
        capture_output=True,
        text=True,
    )
    (project / folder).chmod(0o700)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert folder in done.stderr
    assert "cannot be written" in done.stderr or "not writable" in done.stderr or "Permission" in done.stderr
    assert "epoch" not in done.stderr
