"""The champion as an image: MLflow's Dockerfile with the configuration in it, its steps rehearsed without Docker.

Rehearsed are: that the pinned requirements resolve, and that the entry point answers in a clean folder on nothing
but the model of the image. What needs Docker and a network is not: the base image, apt, `pip install`, nginx.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import live as servers
import numpy as np
import pytest
from click.testing import Result

from cnn_tuning.serving.predictor import Predictor

COMMAND = str(Path(sys.executable).with_name("cnn-tuning"))
OVERRIDES = ("serving.workers=1", "serving.max_images=3", "serving.container.image=digits", "serving.port=9000")


@pytest.fixture(scope="module")
def written(mlflow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A context as the command writes it from a model in a folder, without a project, and what it printed."""
    folder = tmp_path_factory.mktemp("image")
    index = "serving.container.extra_index=https://packages.example/cpu"
    command = [COMMAND, "deploy", "image", "--model", str(mlflow_model), "--context", "context", *OVERRIDES, index]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "context", done.stdout


@pytest.fixture(scope="module")
def model(written: tuple[Path, str]) -> Path:
    """The model's folder, where the Dockerfile says it is."""
    (source,) = re.findall(r"^COPY (\S+) /opt/ml/model$", (written[0] / "Dockerfile").read_text(), re.MULTILINE)
    return written[0] / source


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_dockerfile(written: tuple[Path, str], model: Path, mlflow_model: Path) -> None:
    text = (written[0] / "Dockerfile").read_text()
    version = re.search(r"python: (\S+)", (mlflow_model / "python_env.yaml").read_text())[1]  # type: ignore[index]
    assert re.search(r"^FROM (.*)$", text, re.MULTILINE)[1] == f"python:{version}-slim"  # type: ignore[index]
    for line in (
        'ENV MLFLOW_MODELS_WORKERS="1"',
        'ENV CNN_TUNING_MAX_IMAGES="3"',
        'ENV CNN_TUNING_MAX_PIXELS="50000000"',
        'ENV PIP_EXTRA_INDEX_URL="https://packages.example/cpu"',
    ):
        assert f"\n{line}\n" in text
        assert text.index(line) < text.index("RUN pip install mlflow"), "the build needs the index, too"
    files = {
        path.relative_to(mlflow_model): path.read_bytes() for path in mlflow_model.rglob("*") if path.is_file()
    }
    assert {p.relative_to(model): p.read_bytes() for p in model.rglob("*") if p.is_file()}.items() >= files.items()
    assert "docker build --tag digits:latest context" in written[1]
    assert "docker run --rm -p 127.0.0.1:9000:8080 digits:latest" in written[1]


def test_its_requirements_resolve_against_what_is_installed(model: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet",
               "--disable-pip-version-check", "-r", str(model / "requirements.txt")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pinned = [line for line in (model / "requirements.txt").read_text().splitlines() if line.strip()]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s;]+(; sys_platform.*)?", line) for line in pinned), pinned
    assert {"torch", "mlflow", "uvloop", "httptools"} <= {line.partition("==")[0] for line in pinned}


@pytest.fixture(scope="module")
def image(
    written: tuple[Path, str], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.Live]:
    """The entry point of the Dockerfile in an empty folder, with the model and the port of this test."""
    text = (written[0] / "Dockerfile").read_text()
    entry = re.search(r'^ENTRYPOINT \["python", "-c", "(.*)"\]$', text, re.MULTILINE)[1]  # type: ignore[index]
    clean, port = tmp_path_factory.mktemp("clean"), servers.free_port()
    place = shutil.copytree(model, clean / "model")
    moved = f"import mlflow.models.container as C; C.MODEL_PATH = {str(place)!r}; "
    moved += f"C.DEFAULT_INFERENCE_SERVER_PORT = {port}; "
    told = dict(re.findall(r'^ENV (\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    names = {**told, "DISABLE_NGINX": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    # Out of the repository; MLflow puts the model's own code before what is installed.
    command = ["env", "-C", str(clean), *(f"{name}={value}" for name, value in names.items())]
    with servers.running([*command, sys.executable, "-P", "-c", moved + entry], port) as server:
        yield server


@pytest.mark.slow
def test_its_entry_point_answers_a_picture(image: servers.Live, bundle: Path, digits: np.ndarray) -> None:
    pictures = [servers.png(digit[0]) for digit in digits[:3]]
    reply = image.post({"inputs": [base64.b64encode(picture).decode() for picture in pictures]})
    assert reply.status == 200, reply.text
    expected = Predictor(bundle).predict(pictures)
    assert [row["label"] for row in reply.json["predictions"]] == [answer.label for answer in expected]


@pytest.mark.slow
def test_its_limits_are_those_of_the_configuration(image: servers.Live, digits: np.ndarray) -> None:
    text = base64.b64encode(servers.png(digits[0][0])).decode()
    reply = image.post({"inputs": [text] * 4})
    assert reply.status == 400 and "4 images: send at most 3 a request" in reply.text


def test_without_a_docker_that_answers(
    mlflow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Result]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        "there is no docker here; `--context FOLDER`"
        in command("deploy", "image", "--model", str(mlflow_model)).output
    )
    (tmp_path / "docker").write_text("#!/bin/sh\necho no daemon >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    done = command("deploy", "image", "--model", str(mlflow_model))
    assert "docker does not answer (no daemon)" in done.output and done.exit_code == 1


@pytest.mark.slow
def test_a_docker_builds_from_what_was_written(
    mlflow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Result], capfd: Any
) -> None:
    """A stand-in for the client keeps what it is asked to build."""
    monkeypatch.chdir(tmp_path)
    script = '#!/bin/sh\necho "$@" >> asked\nfor last; do :; done\n[ -d "$last" ] && cp -r "$last" built\nexit 0\n'
    (tmp_path / "docker").write_text(script)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = command("deploy", "image", "--model", str(mlflow_model), "serving.container.image=mnist:7")
    assert done.exit_code == 0 and "image mnist:7 is built" in done.output
    assert "build --platform linux/amd64 --tag mnist:7" in (tmp_path / "asked").read_text()
    assert (tmp_path / "built" / "Dockerfile").is_file()


def test_the_champion_of_the_projects_own_store(registry: Any, command: Callable[..., Result]) -> None:
    done = command("deploy", "image", "--context", "image")
    assert done.exit_code == 0, done.output
    text = Path("image/Dockerfile").read_text()
    assert 'ENV MLFLOW_MODELS_WORKERS="2"' in text  # conf/serving/container.yaml
    assert "docker build --tag cnn-tuning:1 image" in done.output
    assert list(Path("image").rglob("MLmodel"))


def test_a_folder_with_something_in_it_is_left_alone(
    mlflow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Result]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    done = command("deploy", "image", "--model", str(mlflow_model), "--context", "mine")
    assert "mine: is there already" in done.output
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
