"""Row 16: a checkpoint or model file that holds code is refused, and the code does not run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from training_recipes import recipe_with

from cnn_tuning.config import patch
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.models import bundle
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import State

LOAD = """
import sys
from cnn_tuning.tracking.store import quiet_mlflow
quiet_mlflow()
import mlflow
mlflow.pyfunc.load_model(sys.argv[1])
"""


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def ran(*arguments, **environment):
    """Run Python with no more of MLflow's settings than given; return its exit status and what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Touch(path)))
    assert path.exists()  # the fault is real: unpickling runs it
    path.unlink()
    return path


def test_16_a_checkpoint_with_code_is_refused(digits_data, tmp_path, canary):
    recipe = patch(recipe_with([]), {"trainer.max_epochs": 1})
    data = PackedData.open(digits_data)
    state = State(tmp_path / "state", recipe, data.meta.digest)
    state.open()
    # With a valid SHA-256, as somebody who may write the folder would give it.
    state.write({"global_step": 1, "weights": Touch(canary)}, 1)
    with pytest.raises(UserError, match="is not loaded"):
        fit(recipe, data, state_folder=tmp_path / "state")
    assert not canary.exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_16_a_model_file_with_code_is_refused(digits, tmp_path, canary, form):
    model = tmp_path / "model"
    shutil.copytree(digits.path / "models/baseline", model)
    weights = model / bundle.WEIGHTS
    if form == "pickle":
        weights.write_bytes(pickle.dumps(Touch(canary)))
    else:
        torch.save(Touch(canary), weights)
    with pytest.raises(UserError, match="SHA-256 differs"):
        bundle.load(model)
    content = json.loads((model / bundle.MODEL).read_text())
    content["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (model / bundle.MODEL).write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds no safetensors"):
        bundle.load(model)
    assert not canary.exists()


@pytest.fixture
def saved_model(tmp_path, canary):
    """Return the folder of a saved MLflow model whose pickle holds code."""
    import mlflow

    class Same(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input

    folder = tmp_path / "saved"
    mlflow.pyfunc.save_model(folder, python_model=Same(), pip_requirements=["mlflow"])
    (folder / "python_model.pkl").write_bytes(pickle.dumps(Touch(canary)))
    return folder


@pytest.mark.slow
def test_16_mlflow_refuses_a_saved_model_with_code(saved_model, canary):
    status, printed = ran("-c", LOAD, str(saved_model))
    assert status, printed
    assert "Deserializing model using pickle is disallowed" in printed
    assert not canary.exists()
    ran("-c", LOAD, str(saved_model), MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true")
    assert canary.exists()  # the fault is real: MLflow by itself runs it


@pytest.mark.slow
def test_16_a_saved_model_with_code_is_not_served(saved_model, canary):
    status, printed = ran("-c", "from cnn_tuning.cli import main; main()", "serve", "--model", str(saved_model))
    assert status == 1, printed
    assert f"error: {saved_model}: an MLflow model, but not of cnn-tuning: it carries no bundle" in printed
    assert not canary.exists()


def test_16_mlflow_is_told_to_refuse_pickles():
    from pathlib import Path

    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false" in makefile
