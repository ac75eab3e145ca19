"""The house: import directions, and that `dvc.yaml` names what each stage reads and is made of."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cnn_tuning.config import AMBIENT, sections_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
READS = {
    "fetch": "FetchConfig",
    "preprocess": "PreprocessConfig",
    "fetch_weights": "FetchWeightsConfig",
    "train": "TrainConfig",
    "ablate": "AblateConfig",
    "tune": "TuneConfig",
    "diagnose": "DiagnoseConfig",
    "evaluate": "EvaluateConfig",
}
# Rooms that record or show and cannot change what a stage computes.
RECORDS = ("cnn_tuning/tracking", "cnn_tuning/config", "cnn_tuning/errors.py", "cnn_tuning/stages/command.py",
           "cnn_tuning/stages/lineage.py", "cnn_tuning/__init__.py")  # fmt: skip


# Among them, what decides arms, points of a grid, their changes, and which version is the champion.
DECIDES = ("cnn_tuning/config/patching.py", "cnn_tuning/config/variants.py", "cnn_tuning/tracking/gate.py")
PRICE = "tracking.price_per_hour"
VARIANTS = {"applies", "arms", "changes_of", "grid", "side_by_side"}

# What a training tells of itself, in the terminal and in its run: `diagnose` is made of it, trainings are not.
TOLD = ("cnn_tuning/diagnosis/findings.py", "cnn_tuning/diagnosis/judge.py", "cnn_tuning/diagnosis/rules")
TELLS = {"train": (*TOLD, "cnn_tuning/reports"), "ablate": TOLD, "tune": TOLD}


@pytest.mark.parametrize("stage", READS)
def test_a_stage_lists_the_sections_that_it_reads(stage):
    module = importlib.import_module(f"cnn_tuning.stages.{stage}")
    read = sections_of(getattr(module, READS[stage]))
    listed = {name for entry in PIPELINE[stage]["params"] for name in entry["params.lock.yaml"]}
    if stage == "fetch":  # reads a part of its section: another split of the same bytes fetches nothing
        assert listed == {"data.bad_images", "data.csv", "data.files", "data.name", "data.sources"}
        used = re.findall(r"\bconfig\.(\w+)", (SOURCE / "cnn_tuning/data/sources.py").read_text())
        assert {f"data.{name}" for name in used} == listed
    # Of what is only recorded, a price makes the columns of costs.
    own = (file for file in closure(SOURCE / f"cnn_tuning/stages/{stage}.py") if not records(file))
    priced = any(re.search(r"tracking\.price_per_hour\b(?!\))", file.read_text()) for file in own)
    assert {name for name in listed if name.startswith("tracking")} == ({PRICE} if priced else set())
    listed = {name.split(".")[0] for name in listed}
    assert read - AMBIENT <= listed <= read


@pytest.mark.parametrize("stage", READS)
def test_a_stage_depends_on_the_code_that_it_is_made_of(stage):
    listed = [dep for dep in PIPELINE[stage]["deps"] if dep.startswith("src/")]
    for file in closure(SOURCE / f"cnn_tuning/stages/{stage}.py"):
        name = file.relative_to(ROOT).as_posix()
        told = file.relative_to(SOURCE).as_posix().startswith(TELLS.get(stage, ("none",)))
        if records(file) or told or file.name == "__init__.py":
            continue
        assert any(name == dep or name.startswith(dep + "/") for dep in listed), f"{stage} uses {name}"


def records(file: Path) -> bool:
    """Tell whether a file belongs to what records or shows."""
    name = file.relative_to(SOURCE).as_posix()
    return name.startswith(RECORDS) and name not in DECIDES


def closure(start: Path) -> set[Path]:
    """Return the files that a module imports, at the top or inside functions, not through what records."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        if records(file):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                if node.module == "cnn_tuning.config" and VARIANTS & {alias.name for alias in node.names}:
                    names.append("cnn_tuning.config.variants")
            for name in names:
                if name.startswith("cnn_tuning"):
                    place = SOURCE / name.replace(".", "/")
                    waiting += [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()]
    return seen


def test_imports_go_downward_only():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["cnn_tuning.cli", "cnn_tuning.stages.train", "cnn_tuning.stages.configure"])
def test_commands_start_without_what_is_heavy(module):
    heavy = "torch mlflow pytorch_lightning pandas sklearn scipy matplotlib ray timm dvc boto3"
    code = f"import sys, {module}; print(sorted(set({heavy.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HELP = """
import sys
from cnn_tuning.cli import cli
cli(["--help"], standalone_mode=False)
print({"pydantic", "hydra", "omegaconf", "numpy", "torch", "mlflow", "boto3", "optuna"} & set(sys.modules))
"""


def test_the_commands_are_told_without_loading_what_they_run():
    told = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert told.startswith("Usage:")
    assert told.endswith("\nset()\n")
