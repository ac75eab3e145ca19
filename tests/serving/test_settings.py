"""What `serve` and `predict` read: their own sections, and for a model in a folder no project at all."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import live as servers
import numpy as np
import pytest

from cnn_tuning.config import ServingConfig, compose
from cnn_tuning.errors import UserError
from cnn_tuning.serving.settings import Local, Registered, settings

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("cnn-tuning"))
BROKEN = "experiment: digits\nserving: {port: 9001}\nmodel: {dropot: both}\ntrainer: {max_epochs: none}\nsede: 3\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `conf/` and the mistakes of BROKEN in `params.yaml`, none of them in a section read here."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_mistake_elsewhere_is_not_told_here(project: Path) -> None:
    with pytest.raises(UserError, match="3 mistakes"):
        compose()
    for kind in (Local, Registered):
        assert settings(kind).serving.port == 9001
        assert settings(kind, ["serving.workers=2"]).serving.workers == 2
    assert settings(Registered).registry.model == "digits-classifier"
    assert settings(Registered, ["experiment=lab"]).registry.model == "mnist-classifier"


def test_the_same_values_as_the_whole_configuration(project: Path) -> None:
    (project / "params.yaml").write_text("experiment: digits\ntracking: {wait_s: 5}\nregistry: {alias: best}\n")
    whole, own = compose(["serving.port=7"]), settings(Registered, ["serving.port=7"])
    assert (own.serving, own.tracking, own.registry) == (whole.serving, whole.tracking, whole.registry)


@pytest.mark.parametrize(
    ("params", "overrides", "words"),
    [
        ("serving: {prot: 1}", [], "params.yaml:1: serving.prot: unknown name; did you mean 'port'"),
        ("serving: {port: 70000}", ["serving.workers=0"], "2 mistakes"),
        ("serving: 3", [], "expected a mapping"),
        ("experiment: digit", [], "no option 'digit'; did you mean 'digits'"),
        ("seed: 1", ["trainer.max_epochs=1"], "override 'trainer.max_epochs=1': not among"),
        ("seed: 1", ["port=1"], "override 'port=1': not among"),
    ],
)
def test_own_mistakes_are_told(project: Path, params: str, overrides: list[str], words: str) -> None:
    (project / "params.yaml").write_text(params)
    for kind in (Local, Registered):
        with pytest.raises(UserError, match=words):
            settings(kind, overrides)


def test_without_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings(Local).serving == ServingConfig(name="default")
    given = settings(Local, ["serving.port=9", "serving.allowed_hosts=[a.example]"]).serving
    assert (given.port, given.allowed_hosts) == (9, ("a.example",))
    with pytest.raises(UserError, match="did you mean 'port'"):
        settings(Local, ["serving.prot=9"])
    with pytest.raises(UserError, match="--model FOLDER"):
        settings(Registered)


def test_predict_needs_no_project_for_a_folder(bundle: Path, digits: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(servers.png(digits[0, 0]))
    command = [COMMAND, "predict", "seven.png", "--model", str(bundle)]
    done = subprocess.run([*command, "--out", "out.csv"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out.csv: 1 picture classified by bundle version local" in " ".join(done.stdout.split())
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 1


def test_serve_needs_no_project_for_a_folder(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port = servers.free_port()
    with servers.running([COMMAND, "serve", "--model", str(bundle), f"serving.port={port}"], port) as server:
        assert server.ask("/health").json["name"] == "bundle"
    assert not list(tmp_path.iterdir()), "and leaves nothing behind"
