"""Pretrained weights as an output of the pipeline: fetched once, pushed to the remote, trained from anywhere."""

from __future__ import annotations

import json
import shutil

import backbones
import pytest
from project import Project

from cnn_tuning.data.digests import sha256_of

PARAMS = """
experiment: smoke
data: {{limit: 200, image: {{size: [32, 32], channels: 3, interpolation: bicubic}}}}
model:
  name: resnet50
  arguments: {{name: test_resnet, units: 16}}
  pretrained: true
  weights:
    file: tiny.pth
    sha256: {sha256}
    sources: [{{uri: 'file:{folder}/'}}]
augment: none
trainer: {{max_epochs: 1, finetune: {{trainable: head}}}}
"""


@pytest.mark.slow
def test_weights_are_fetched_pushed_and_pulled_without_their_source(tmp_path):
    published = tmp_path / "published"
    backbones.save_weights(published / "tiny.pth", seed=1)
    params = PARAMS.format(sha256=sha256_of(published / "tiny.pth"), folder=published)
    project = Project(tmp_path / "project", params)
    printed = project.repro("train")
    assert "models/pretrained: 90 tensors of test_resnet" in printed
    assert "features of" in printed
    assert "Running stage" not in project.repro("train")
    # Another head: the backbone, its weights and its features are the same.
    (project.path / "params.yaml").write_text(params.replace("units: 16", "units: 8"))
    printed = project.repro("train")
    assert "Running stage 'train'" in printed
    assert "pictures in" not in printed
    project.run("dvc", "remote", "add", "-d", "store", str(tmp_path / "remote"))
    project.run("dvc", "push", "models/pretrained")
    # A host that has the repository and the remote, and neither the weights' source nor a hub.
    shutil.rmtree(published)
    shutil.rmtree(project.path / "models/pretrained")
    shutil.rmtree(project.path / ".dvc/cache")
    project.run("dvc", "pull", "fetch_weights")
    assert json.loads(project.text("models/pretrained/source.json"))["name"] == "test_resnet"
    # The recipe names other weights: nothing is trained with these.
    (project.path / "params.yaml").write_text(params.replace(params.split("sha256: ")[1][:64], "ab" * 32))
    printed = project.run("dvc", "repro", "train", fails=True)
    assert "no source gave the pretrained weights tiny.pth" in printed
