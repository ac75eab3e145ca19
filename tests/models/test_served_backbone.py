"""A fine-tuned backbone as the registered model: it loads where neither this repository nor its weights are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import backbones
import numpy as np
import pytest

from cnn_tuning.config import patch
from cnn_tuning.models import bundle
from cnn_tuning.serving import pyfunc
from cnn_tuning.serving.predictor import Predictor
from cnn_tuning.training.fit import fit

FRESH = """
import json, os, sys
sys.path.append(os.environ["PACKAGES"])
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
texts = json.load(open(sys.argv[1] + "/serving_input_example.json"))["dataframe_split"]["data"]
answer = model.predict(pd.DataFrame(texts, columns=["image"]), params={"top_k": 3}).to_dict("records")
import cnn_tuning
print(json.dumps({"package": cnn_tuning.__file__, "answer": answer}))
"""


@pytest.mark.slow
def test_it_predicts_in_a_fresh_process_without_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = backbones.pictures(tmp_path / "data", train=24, val=12)
    recipe = patch(
        backbones.pretrained_recipe(tmp_path), {"trainer.finetune.trainable": "head", "trainer.max_epochs": 1}
    )
    fitted = fit(recipe, data, state_folder=tmp_path / "state")
    bundle.save(tmp_path / "bundle", fitted.network, fitted.specification)
    image = np.array(data.split("val").images[0])
    pyfunc.save(tmp_path / "bundle", tmp_path / "model", image)
    lines = (tmp_path / "model/requirements.txt").read_text().split()
    assert {"timm", "torchvision"} < {line.partition("==")[0] for line in lines}
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", FRESH, str(tmp_path / "model")],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PACKAGES": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["package"]).is_relative_to(tmp_path / "model/code")
    (expected,) = Predictor(tmp_path / "bundle").predict([image.transpose(1, 2, 0)], 3)
    (answer,) = result["answer"]
    assert answer["label"] == expected.label
    assert [choice["probability"] for choice in answer["top_k"]] == pytest.approx(
        [choice.probability for choice in expected.top_k], abs=1e-6
    )
