"""A model in, a Docker image that answers with it out: MLflow's Dockerfile, with the configuration in it.

It is what `mlflow models build-docker` builds, and a few ENV lines: workers, limits, and a further package index
for the build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cnn_tuning.config import ServingConfig
from cnn_tuning.errors import UserError, redact
from cnn_tuning.serving import inputs

PORT = 8080  # of MLflow's images


def environment_of(serving: ServingConfig) -> dict[str, str]:
    """Return what brings workers and limits to MLflow's server and to the model in it."""
    return {
        "MLFLOW_MODELS_WORKERS": str(serving.workers),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        inputs.IMAGES_LIMIT: str(serving.max_images),
        inputs.PIXELS_LIMIT: str(serving.max_pixels),
    }


def tag_of(serving: ServingConfig, version: str) -> str:
    """Return the image's name, with the model's version unless it has a tag."""
    image = serving.container.image
    return image if ":" in image else f"{image}:{version or 'latest'}"


def run_line(serving: ServingConfig, tag: str) -> str:
    """Return the command that runs the image on loopback."""
    return f"docker run --rm -p 127.0.0.1:{serving.port or PORT}:{PORT} {tag}"


def write_context(model: str, folder: Path, serving: ServingConfig, store: str | None = None) -> None:
    """Write the Dockerfile and the model that it takes to a new folder; `store`: where a registered one is.

    Raises:
        UserError: the folder is not empty, or MLflow cannot write it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already: give --context a new folder")
    command = [sys.executable, "-m", "mlflow", "models", "generate-dockerfile", "-m", model, "-d", str(folder)]
    # In the environment and not among the arguments, which every user of the machine can read.
    environment = {**os.environ, **({"MLFLOW_TRACKING_URI": store} if store else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"mlflow models generate-dockerfile: {redact(reason)[:300]}")
    file = folder / "Dockerfile"
    first, line, rest = file.read_text().partition("WORKDIR ")
    if not line:
        raise UserError(
            f"{file}: not as MLflow used to write it: `mlflow models build-docker` builds without limits"
        )
    index = serving.container.extra_index
    build = {"PIP_EXTRA_INDEX_URL": index} if index else {}
    told = "".join(f'ENV {name}="{value}"\n' for name, value in {**environment_of(serving), **build}.items())
    file.write_text(f"{first}{told}{line}{rest}")


def build(model: str, tag: str, serving: ServingConfig, store: str | None = None) -> None:
    """Build the image with the Docker that is here; its output is shown. Arguments: see `write_context`.

    Raises:
        UserError: there is no Docker here, or the build failed.
    """
    elsewhere = "`--context FOLDER` writes what is needed to build elsewhere"
    docker = shutil.which("docker")
    if docker is None:
        raise UserError(f"there is no docker here; {elsewhere}")
    answer = subprocess.run([docker, "version", "--format", "ok"], capture_output=True, text=True)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"docker does not answer ({reason}); {elsewhere}")
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch) / "context"
        write_context(model, context, serving, store)
        # AMD64 as SageMaker and MLflow have it, also on a Mac.
        command = [docker, "build", "--platform", "linux/amd64", "--tag", tag, str(context)]
        if subprocess.run(command).returncode:
            raise UserError(f"docker build failed: its output is above; {elsewhere}")
