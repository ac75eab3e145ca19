"""A folder apart for benchmarks: data prepared once, stages run in it as subprocesses, the machine described."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scratch/bench"


def stage(name: str, *overrides: str, inputs: Path = FOLDER, outputs: Path = FOLDER) -> None:
    """Run a stage as a user does, with runs tracked in a store of this folder's own."""
    command = [sys.executable, "-m", f"cnn_tuning.stages.{name}", *overrides]
    command += ["--inputs", str(inputs), "--outputs", str(outputs)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{FOLDER}/mlflow.db"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")


def prepared(experiment: str) -> Path:
    """Fetch and preprocess an experiment's data, unless done before; return the folder to train from."""
    folder = FOLDER / experiment
    if not (folder / "data/prepared/meta.json").exists():
        stage("fetch", f"experiment={experiment}", outputs=folder)
        stage("preprocess", f"experiment={experiment}", inputs=folder, outputs=folder)
    return folder


def trained(folder: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """Train as the stage does and return its facts: seconds, samples per second and the rest."""
    stage("train", *overrides, inputs=folder, outputs=out)
    return json.loads((out / "results/training/training.json").read_text())


def machine() -> str:
    """Return one line on machine, date and commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    return f"{time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip()}, {cores} × {cpu}, load before {load:.1f}"
