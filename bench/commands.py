"""Seconds that a user waits for: the pipeline from nothing, the same again, `--help`; each against its goal.

    python bench/commands.py                       the default experiment, some ten minutes
    python bench/commands.py --experiment smoke    seconds, to see that it works

The commit is cloned into a folder of its own, with an empty cache, and run with the packages of this environment.
Goes out: seconds of each stage, and a table with the ratio to the goal (1 or less: met).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from workplace import FOLDER, ROOT, machine

BINARIES = Path(sys.executable).parent
# The pipeline without ablation and search.
SPINE = ("configure", "fetch", "preprocess", "fetch_weights", "train", "diagnose", "evaluate")
GOALS = {"pipeline": 480.0, "without ablation and search": 180.0, "pipeline again": 3.0, "--help": 0.3}
STAGE = re.compile(r"^Running stage '(\w+)'")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="mnist", help="default: mnist")
    experiment = parser.parse_args().experiment
    described = machine()
    place = FOLDER / "commands"
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", ROOT, place], check=True)
    params = place / "params.yaml"
    params.write_text(re.sub(r"(?m)^experiment: .*$", f"experiment: {experiment}", params.read_text()))
    stages = _pipeline(place)
    total = stages.pop("")
    seconds = {
        "pipeline": total,
        "without ablation and search": sum(stages.get(name, 0.0) for name in SPINE),
        "pipeline again": statistics.median(_timed(place, "dvc", "repro", "--quiet") for _ in range(5)),
        "--help": statistics.median(_timed(place, "cnn-tuning", "--help") for _ in range(9)),
    }
    print(f"{described}, experiment {experiment}")
    print(", ".join(f"{name} {took:.1f} s" for name, took in stages.items()))
    print("\n| what | seconds | goal | ratio |\n|---|---|---|---|")
    for name, took in seconds.items():
        print(f"| {name} | {took:.2f} | {GOALS[name]:g} | {took / GOALS[name]:.2f} |")


def _environment(place: Path) -> dict[str, str]:
    own = {"PATH": f"{BINARIES}:{os.environ['PATH']}", "PYTHONPATH": str(place / "src"), "DVC_NO_ANALYTICS": "1"}
    return {**os.environ, **own}


def _pipeline(place: Path) -> dict[str, float]:
    """Return the seconds of each stage of a first `dvc repro`, and of all under the empty name."""
    command = [str(BINARIES / "dvc"), "repro"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=place, env=_environment(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    begins: list[tuple[str, float]] = []
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if found := STAGE.match(line):
            begins.append((found[1], time.monotonic()))
    if process.wait():
        sys.exit(f"dvc repro failed in {place}")
    ends = [moment for _, moment in begins[1:]] + [time.monotonic()]
    return {name: end - at for (name, at), end in zip(begins, ends, strict=True)} | {"": time.monotonic() - began}


def _timed(place: Path, name: str, *arguments: str) -> float:
    """Return the seconds that a command takes."""
    began = time.monotonic()
    subprocess.run(
        [str(BINARIES / name), *arguments],
        cwd=place,
        env=_environment(place),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - began


if __name__ == "__main__":
    main()
