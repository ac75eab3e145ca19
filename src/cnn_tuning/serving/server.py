"""A model's name in, a running HTTP server out: finds the bundle and starts Granian around the front."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import ServingConfig
from cnn_tuning.errors import UserError

if TYPE_CHECKING:
    from cnn_tuning.serving.predictor import Predictor

# Connections a worker reads from at once; more wait in the kernel's backlog.
CONNECTIONS = 256
STOP_S = 20


@dataclass(frozen=True)
class Served:
    """A bundle on disk and what to call it."""

    bundle: Path
    name: str
    version: str


def serve(model: str, config: ServingConfig) -> None:
    """Answer HTTP until SIGTERM or Ctrl-C; requests under way are finished first.

    Args:
        model: `models:/name@alias`, another MLflow model URI, a saved MLflow model, or a bundle's folder.
        config: address and limits.

    Raises:
        UserError: there is no such model, or the address is taken.
    """
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels

    served = find(model)
    _check_free(config)
    # Forking a process that has threads (mlflow starts some) may lock up: workers start afresh.
    multiprocessing.set_start_method("spawn", force=True)
    Granian(
        "cnn_tuning.serving.server",
        address=config.host,
        port=config.port,
        interface=Interfaces.ASGI,
        workers=config.workers,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=min(60_000, int(config.header_timeout_s * 1000))),
        websockets=False,
        backpressure=CONNECTIONS,
        respawn_failed_workers=False,
        workers_kill_timeout=STOP_S,
        log_level=LogLevels.warning,
    ).serve(target_loader=functools.partial(_load, served, config), wrap_loader=False)


def find(model: str) -> Served:
    """Return the bundle that `model` names, downloaded if it is not local."""
    folder = Path(model)
    if ":/" not in model:
        if not folder.is_dir():
            raise UserError(f"{model}: no such folder; give a bundle's folder or models:/NAME@ALIAS")
        return _inside(folder, folder.resolve().name, "local")
    return _inside(Path(_download(model)), *_name_and_version(model))


def _inside(folder: Path, name: str, version: str) -> Served:
    """Return the bundle in `folder`, which is one, or is a saved MLflow model that carries one."""
    if (folder / "model.json").is_file():
        return Served(folder, name, version)
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{folder}: neither a bundle (model.json) nor an MLflow model (MLmodel)")
    import yaml

    flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"].get("python_function", {})
    bundle = flavor.get("artifacts", {}).get("bundle", {}).get("path")
    if bundle is None or not (folder / bundle / "model.json").is_file():
        raise UserError(f"{folder}: an MLflow model, but not of cnn-tuning: it carries no bundle")
    return Served(folder / bundle, name, version)


def _download(uri: str) -> str:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.artifacts.download_artifacts(uri)
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{uri}: {reason} (tracking URI {_shown(mlflow.get_tracking_uri())})") from None


def _name_and_version(uri: str) -> tuple[str, str]:
    from mlflow import MlflowClient

    if not uri.startswith("models:/"):
        return uri.rpartition("/")[2], "unregistered"
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        return name, str(MlflowClient().get_model_version_by_alias(name, alias).version)
    name, _, version = name.partition("/")
    return name, version or "unregistered"


def _shown(uri: str) -> str:
    """Return a URI without a user's name or password."""
    scheme, slashes, rest = uri.partition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


def _check_free(config: ServingConfig) -> None:
    import socket

    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        where = f"{config.host}:{config.port}"
        raise UserError(f"cannot listen on {where} ({error.strerror}): set serving.port to a free one") from None


def _load(served: Served, config: ServingConfig) -> Any:
    """Return the application; runs in each worker process, before it reads a request."""
    from cnn_tuning.serving.front import application
    from cnn_tuning.serving.predictor import Predictor

    _stop_with_parent()
    try:
        predictor = Predictor(served.bundle, max_pixels=config.max_pixels)
        _warm_up(predictor)
    except UserError as error:
        print(f"cnn-tuning: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(
        f"{served.name} version {served.version} answers on http://{config.host}:{config.port} (Ctrl-C stops it)",
        flush=True,
    )
    return application(predictor, config, served.name, served.version)


def _warm_up(predictor: Predictor) -> None:
    """Run each size of batch once: torch prepares a size at its first use, which takes up to 0.3 s."""
    import numpy as np

    from cnn_tuning.serving.front import TOGETHER

    for count in range(1, TOGETHER + 1):
        predictor.probabilities(np.zeros((count, *predictor.specification.shape), np.uint8))


def _stop_with_parent() -> None:
    """End this worker when the process that started it is gone, however it went."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
