"""`cnn-tuning verify` where `dvc.lock` has nothing to compare with: a line, and no training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cnn_tuning.cli import cli
from cnn_tuning.config import DiagnosisConfig
from cnn_tuning.errors import UserError
from cnn_tuning.stages.command import Place
from cnn_tuning.stages.lineage import data_hash, recorded
from cnn_tuning.stages.lineage import stopping as stopping_of


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "stages:",
        "stages: {}",
        "stages:\n  train: {outs: [{path: data/raw, md5: a}]}",
        "stages: [",
        "- a",
    ],
)
def test_a_lock_file_that_knows_no_model_is_said_in_a_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("dvc.lock").write_text(content)
    done = CliRunner().invoke(cli, ["verify"])
    assert isinstance(done.exception, UserError)  # printed by the command without a traceback
    assert str(done.exception) == "dvc.lock does not know models/baseline: run `dvc repro` first"
    assert not Path("scratch").exists()


@pytest.mark.parametrize("stopping", [{}, {"overfitting": {"ratio": 2.0}}])
def test_what_may_end_a_training_is_recorded_with_it(tmp_path, monkeypatch, stopping):
    monkeypatch.chdir(tmp_path)
    diagnosis = {"rules": {"overfitting": {"action": "stop"}}, "stopping": stopping}
    locked = {"seed": 3, "diagnosis": diagnosis, "tracking": {"name": "default"}}
    Path("params.lock.yaml").write_text(yaml.safe_dump(locked))
    ending = {"diagnosis.stopping.overfitting.ratio": 2.0} if stopping else {}
    assert recorded({}, Place(Path(), Path())) == {"seed": 3} | ending
    own = {"seed": 3} | stopping_of(DiagnosisConfig("default", stopping=stopping))
    assert recorded(own, Place(Path(), Path("scratch"), "digits")) == {"seed": 3} | ending


def test_the_hash_of_an_output(tmp_path):
    lock = tmp_path / "dvc.lock"
    lock.write_text("stages:\n  a: {cmd: x}\n  b: {outs: [{path: data/prepared, md5: abc.dir}]}\n")
    assert data_hash(Path("data/prepared"), lock) == "abc.dir"
