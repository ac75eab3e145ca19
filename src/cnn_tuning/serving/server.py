"""A model's name in, a running HTTP server out: finds the bundle and starts Granian around the front."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import ServingConfig
from cnn_tuning.data.digests import sha256_of
from cnn_tuning.errors import UserError, redact
from cnn_tuning.tracking.registry import BUNDLE_TAG
from cnn_tuning.tracking.store import absolute, open_store, problem_of, sqlite_path

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


def serve(
    model: str,
    config: ServingConfig,
    uri: str | None = None,
    beside: Callable[[Served, ServingConfig], None] | None = None,
) -> None:
    """Answer HTTP until SIGTERM or Ctrl-C; requests under way are finished first. `model`, `uri`: see `find`.

    `beside` is called in a thread of its own with what is served and where, when it is about to answer.

    Raises:
        UserError: there is no such model, or the address is taken.
    """
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels

    config = _bindable(config)
    served = find(model, uri)
    # Threads of torch that wait by spinning hold up those of other programs, and of this one: on two busy cores
    # a pass took 0.3 s instead of 4 ms. Workers read it when they start.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Forking a process that has threads (mlflow starts some) may lock up: workers start afresh.
    multiprocessing.set_start_method("spawn", force=True)
    if beside is not None:
        threading.Thread(target=beside, args=(served, config), daemon=True).start()
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


def is_uri(model: str) -> bool:
    """Tell whether a model is named by a URI, for which a store is asked, and not by a folder."""
    return ":/" in model


def find(model: str, uri: str | None = None) -> Served:
    """Return the bundle that `model` names, downloaded for this process if it is not a folder.

    Args:
        model: `models:/NAME@ALIAS`, another MLflow model URI, a saved MLflow model, or a bundle's folder.
        uri: the tracking store (default: MLFLOW_TRACKING_URI, or `mlflow.db` here).
    """
    if is_uri(model):
        return _registered(model, absolute(uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"))
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"{model}: no such folder; give a bundle's folder or models:/NAME@ALIAS")
    return _inside(folder, folder.resolve().name, "local")


def _inside(folder: Path, name: str, version: str) -> Served:
    """Return the bundle in `folder`, which is one, or is a saved MLflow model that carries one."""
    if (folder / "model.json").is_file():
        return Served(folder, name, version)
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{folder}: neither a bundle (model.json) nor an MLflow model (MLmodel)")
    import yaml

    try:
        flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"].get("python_function", {})
        bundle = flavor.get("artifacts", {}).get("bundle", {}).get("path")
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'MLmodel'}: damaged: save or download the model again") from None
    if bundle is None or not (folder / bundle / "model.json").is_file():
        raise UserError(f"{folder}: an MLflow model, but not of cnn-tuning: it carries no bundle")
    return Served(folder / bundle, name, version)


def _registered(model: str, uri: str) -> Served:
    named = registered(model, uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    copy = tempfile.mkdtemp(prefix="cnn-tuning-")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    try:
        downloaded = mlflow.artifacts.download_artifacts(named.uri, dst_path=copy, tracking_uri=uri)
    except (MlflowException, OSError) as error:
        raise _refused(model, uri, error) from None
    served = _inside(Path(downloaded), named.name, named.version or "unregistered")
    if named.bundle_sha256 not in (None, sha256_of(served.bundle / "model.json")):
        raise UserError(
            f"{model}: its files are not those that were registered (SHA-256 differs): promote another version"
        )
    return served


@dataclass(frozen=True)
class Named:
    """A model in a store. `uri` names this version whatever its alias does later; `version` may be empty.

    `bundle_sha256`: of what was registered; None for a model that is not, or was by older code.
    """

    name: str
    version: str
    uri: str
    bundle_sha256: str | None = None


def registered(model: str, uri: str) -> Named:
    """Return which model `model` stands for now in the store at `uri`.

    Raises:
        UserError: the store does not answer, or has no such model.
    """
    path = sqlite_path(uri)
    problem = "no such file" if path and not path.exists() else problem_of(uri)
    if problem:
        hint = "run `make repro` first, or set MLFLOW_TRACKING_URI"
        raise UserError(f"{model}: tracking store {redact(uri)} cannot be used ({problem}): {hint}")
    client = open_store(uri)
    from mlflow.exceptions import MlflowException

    if not model.startswith("models:/"):
        return Named(model.rpartition("/")[2], "", model)
    name, at, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    try:
        # The version is settled first: an alias may move between two questions.
        found = client.get_model_version_by_alias(name, alias) if at else None
        if found is None and version.isdecimal():
            found = client.get_model_version(name, version)
    except (MlflowException, OSError) as error:
        raise _refused(model, uri, error) from None
    if found is None:
        return Named(name, version, f"models:/{name}/{version}" if version else model)
    version = str(found.version)
    return Named(name, version, f"models:/{name}/{version}", found.tags.get(BUNDLE_TAG))


def _refused(model: str, uri: str, error: Exception) -> UserError:
    reason = redact((str(error) or type(error).__name__).splitlines()[0])
    return UserError(f"{model}: {reason} (tracking store {redact(uri)})")


def _bindable(config: ServingConfig) -> ServingConfig:
    """Return `config` with a port that is free: its own, or any where it says 0."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
            return dataclasses.replace(config, port=probe.getsockname()[1])
    except OSError as error:
        where, reason = f"{config.host}:{config.port}", error.strerror or error
        raise UserError(f"cannot listen on {where} ({reason}): set serving.host and serving.port") from None


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
    host = f"[{config.host}]" if ":" in config.host else config.host
    where = f"http://{host}:{config.port}"
    print(f"{served.name} version {served.version} answers on {where} (Ctrl-C stops it)", flush=True)
    return application(predictor, config, served.name, served.version)


def _warm_up(predictor: Predictor) -> None:
    """Run each size of batch once: torch prepares a size at its first use, which takes some ms."""
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
