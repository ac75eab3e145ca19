"""The notebook, run from its first cell to its last in a fresh project, and what its cells come to."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from project import ROOT, Project

NOTEBOOK = Path("notebooks/cnn_tuning.ipynb")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A project as somebody cloned it; its params.yaml, of another experiment, has no say in the notebook."""
    return Project(tmp_path_factory.mktemp("notebook") / "project", "experiment: mnist\nseed: 5\n", docs=True)


@pytest.fixture(scope="module")
def executed(project) -> Any:
    """The notebook as it stands after its last cell; run in its own folder, by this Python."""
    patch = pytest.MonkeyPatch()
    # The kernel of this environment, whatever a person has installed besides; no display of theirs, no store.
    for name, value in {**project.environment, "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}.items():
        patch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_URI", "MPLBACKEND", "COLUMNS"):
        patch.delenv(name, raising=False)
    notebook = read(project.path / NOTEBOOK)
    folder = project.path / NOTEBOOK.parent
    try:
        NotebookClient(
            notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}}
        ).execute()
    finally:
        patch.undo()
        nbformat.write(notebook, project.path / "executed.ipynb")
    return notebook


def output(notebook: Any, source: str) -> str:
    """Return all text that the one cell with this source printed or showed."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and source in c.source)
    parts = []
    for out in cell.outputs:
        data = out.get("data", {})
        parts.append(out.get("text") or data.get("text/html") or data.get("text/plain") or "")
    return "\n".join(parts)


def test_it_is_kept_without_outputs_and_in_short_cells():
    notebook = read(ROOT / NOTEBOOK)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 12
    assert "/" not in json.dumps(notebook.metadata)  # no path of a machine


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_walk_comes_to_what_it_says(project, executed):
    lab = project.path / "scratch/notebook/digits"
    assert "1,294 train, 144 val, 359 test" in output(executed, 'lab.run("fetch", "preprocess")')
    assert re.search(r"Linear.*\n.*Total params|Total params", output(executed, "lab.layers()"))

    # The first network learns, and its accuracy has an interval.
    said = output(executed, "print(lab.validation())")
    value, low, high = (float(x) for x in re.findall(r"([\d.]+)%", said)[1:])
    assert 95 < low <= value <= high + 1e-9

    # The one with few images overfits, and the rule says so with a remedy.
    found = output(executed, "overfit.findings()")
    assert "<b>overfitting</b>" in found
    assert "model.dropout=both" in found

    # Each comparison of the ablation has its interval, and its cost.
    ablated = output(executed, 'lab.run("ablate")')
    assert re.search(r"dropout=both against dropout=none.*\[-?[\d.]+, [\d.]+\]", ablated)
    assert re.search(r"6 trainings cost \$0\.0\d+", ablated)
    with (lab / "results/ablation/dropout/arms.csv").open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["3", "3"]

    # The search made its trials, and the test images were asked by both models.
    assert re.search(r"of 4 trials|None of 4 trials", output(executed, 'lab.run("tune")'))
    metrics = json.loads((lab / "results/evaluation/metrics.json").read_text())
    assert metrics["baseline"]["test"]["accuracy"] > 0.95
    assert metrics["tuned"]["test"]["accuracy_low"] < metrics["tuned"]["test"]["accuracy"]
    evaluated = output(executed, 'lab.run("evaluate")')
    assert "McNemar p" in evaluated
    assert "for each point of test accuracy" in evaluated or "gained no test accuracy" in evaluated

    # The table of runs: both trainings, ablation and search, with dollars.
    table = output(executed, "lab.compare()")
    assert [len(re.findall(rf"^{kind} ", table, re.MULTILINE)) for kind in ("train", "ablate", "tune")] == [
        2,
        1,
        1,
    ]
    assert re.search(r"4 runs, together .*, \$0\.\d+", table)

    # The model answers over HTTP what the digit is.
    assert re.search(r"first answer [\d.]+ s after", output(executed, "front.ask"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_pictures_are_there_and_nothing_is_complained_about(executed):
    shown = [out for cell in executed.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in shown) == 10
    assert not [out.text for out in shown if out.get("name") == "stderr"]
    texts = "\n".join(out.get("text", "") for out in shown)
    assert "Warning" not in texts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_training_is_in_mlflow_and_the_project_is_as_it_was(project, executed):
    store = sqlite3.connect(project.path / "mlflow.db")
    kinds = dict(store.execute("select value, count(*) from tags where key = 'cnn_tuning.kind' group by value"))
    store.close()
    assert {kind: kinds[kind] for kind in ("train", "arm", "trial", "refit", "evaluate")} == {
        "train": 2,
        "arm": 6,
        "trial": 4,
        "refit": 2,
        "evaluate": 2,
    }
    assert project.run("git", "status", "--porcelain").split() == ["??", "executed.ipynb"]
    assert not (project.path / "models/baseline").exists()
