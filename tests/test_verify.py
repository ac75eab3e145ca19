"""`cnn-tuning verify` where `dvc.lock` has nothing to compare with: a line, and no training."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cnn_tuning.cli import cli
from cnn_tuning.errors import UserError
from cnn_tuning.stages.lineage import data_hash


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


def test_the_hash_of_an_output(tmp_path):
    lock = tmp_path / "dvc.lock"
    lock.write_text("stages:\n  a: {cmd: x}\n  b: {outs: [{path: data/prepared, md5: abc.dir}]}\n")
    assert data_hash(Path("data/prepared"), lock) == "abc.dir"
