"""What `serve` and `predict` read: their own sections, and for a model in a folder no project at all."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import live as servers
import numpy as np
import pytest

from cnn_tuning.config import ServingConfig, compose
from cnn_tuning.errors import UserError
from cnn_tuning.serving.first_answer import METRIC
from cnn_tuning.serving.settings import Local, Registered, champion, settings, settings_for

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
        told = _first_answer(server)
    assert not list(tmp_path.iterdir()), "and leaves nothing behind"
    assert 0 < told < 300


def _first_answer(server: servers.Live) -> float:
    """Return the seconds that the server tells on its terminal."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := re.search(
            r"^first answer ([0-9.]+) s after the command$", server.log.read_text(), re.MULTILINE
        ):
            return float(found[1])
        time.sleep(0.1)
    raise AssertionError(server.log.read_text())


def test_one_configuration_for_serving_and_deployment(project: Path) -> None:
    (project / "params.yaml").write_text(
        "experiment: mnist\nserving: {max_images: 9, model: mine, endpoint: {instances: 4}}\n"
    )
    here, there = settings(Registered), settings_for(Registered, "sagemaker", ["serving.alias=best"])
    assert (here.serving.name, there.serving.name) == ("default", "sagemaker")
    for own in (here, there):
        assert (own.serving.max_images, own.serving.endpoint.instances) == (9, 4)
    assert champion(here.serving, here.registry) == "models:/mine@champion"
    assert champion(there.serving, there.registry) == "models:/mine@best"
    (project / "conf/serving/large.yaml").write_text(
        "defaults: [sagemaker, _self_]\nname: large\nendpoint: {instance_type: ml.m5.xlarge}\n"
    )
    (project / "params.yaml").write_text("experiment: mnist\nserving: large\n")
    assert settings_for(Registered, "sagemaker").serving.endpoint.instance_type == "ml.m5.xlarge"
    with pytest.raises(UserError, match="serving=large is made for sagemaker"):
        settings_for(Registered, "container")


@pytest.mark.slow
def test_the_first_answer_of_a_registered_model_is_recorded(
    project: Path, bundle: Path, mlflow_model: Path, store_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnn_tuning.tracking.store import open_store

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_db}")
    client = open_store(f"sqlite:///{store_db}")
    client.create_registered_model("digits-classifier")
    client.create_model_version("digits-classifier", str(mlflow_model))
    client.set_registered_model_alias("digits-classifier", "champion", "1")
    port = servers.free_port()
    with servers.running([COMMAND, "serve", f"serving.port={port}", "serving.max_images=5"], port) as server:
        told = _first_answer(server)
        deadline = time.monotonic() + 60
        while not (runs := client.search_runs(["1"], f"metrics.`{METRIC}` > 0")) and time.monotonic() < deadline:
            time.sleep(0.2)
    (run,) = runs
    assert run.data.metrics[METRIC] == pytest.approx(told, abs=0.06)
    assert run.data.params["serving.max_images"] == "5"
    assert run.data.tags["model"] == "digits-classifier version 1"
    assert run.data.tags["serving.where"] == "local"
