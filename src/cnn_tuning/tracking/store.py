"""Tracking stores: which URI is meant, whether it answers, and an MLflow client on it.

A URI written down anywhere is without its user and password; `with_password` finds the whole one again in
the environment of the process that delivers.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import TrackingConfig
from cnn_tuning.errors import UserError, hide, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

PRIVATE_URI = "CNN_TUNING_TRACKING_URI"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
DENIED = "PERMISSION_DENIED"  # MLflow's code for a user without the right
PORTS = {"postgresql": 5432, "mysql": 3306}
PROBE_S = 3.0
REQUEST_S = 10


def tracking_uri(config: TrackingConfig) -> str:
    """Return the store that `config` means, absolute: its own, MLFLOW_TRACKING_URI, or `mlflow.db` here."""
    uri = absolute(config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    hide(uri)
    return uri


def absolute(uri: str) -> str:
    """Return `uri` with a relative SQLite path made absolute; refuse what MLflow cannot use."""
    scheme = re.match(r"([a-z]+)(\+\w+)?:", uri)
    if scheme is None or scheme[1] not in SCHEMES:
        known = "sqlite:///mlflow.db, http://HOST:PORT, postgresql://…"
        raise UserError(f"tracking.uri {uri!r} is no tracking store: write one of {known}")
    path = sqlite_path(uri)
    return f"sqlite:///{path.resolve()}" if path else uri


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a SQLite URI, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def problem_of(uri: str) -> str | None:
    """Return in a few words why a store cannot be reached now, None where it answers (at most 3 s)."""
    path = sqlite_path(uri)
    if path is not None:
        if not path.parent.is_dir():
            return f"no folder {path.parent}"
        return None if os.access(path if path.exists() else path.parent, os.W_OK) else "not writable"
    if not uri.startswith(("http://", "https://")):
        return _database_problem(uri)
    import httpx

    server, (user, password) = uri.rstrip("/"), credentials()
    auth = (user, password) if user and password else None
    try:
        status = httpx.get(f"{server}/health", timeout=PROBE_S).status_code
        if status >= 500:
            return f"answers with status {status}"
        # Health is open to all; a server without users does not know this address and says so.
        known = httpx.get(f"{server}/api/2.0/mlflow/users/current", timeout=PROBE_S, auth=auth).status_code
    except httpx.TimeoutException:
        return f"no answer within {PROBE_S:g} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return redact(str(error)) or type(error).__name__
    return _not_let_in() if known == 401 and "MLFLOW_TRACKING_TOKEN" not in os.environ else None


def _database_problem(uri: str) -> str | None:
    """Return why nothing listens where a database should; its driver is loaded by the deliverer only."""
    import socket

    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return "it is no URI of a database"
    port = url.port or PORTS.get(url.get_backend_name())
    if not url.host or port is None:
        return None  # a socket of this machine, or a name that only the driver knows
    try:
        socket.create_connection((url.host, port), PROBE_S).close()
    except TimeoutError:
        return f"no answer within {PROBE_S:g} s"
    except OSError as error:
        return f"{url.host}:{port}: {(error.strerror or str(error)).lower()}"
    return None


def credentials() -> tuple[str | None, str | None]:
    """Return user and password for a server, where MLflow looks for them: the environment, then a file."""
    file = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError):
        file.read(Path.home() / ".mlflow/credentials")
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    user, password = (os.environ.get(n) or file.get("mlflow", n, fallback=None) for n in names)
    return user, password


def refused(right: str) -> str:
    """Return what a person reads whose user lacks a right on the server."""
    return f"user {credentials()[0] or '(none)'} lacks {right}; an administrator of the server gives it"


def _not_let_in() -> str:
    where = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials"
    user = credentials()[0]
    if user is None:
        return f"it asks for a user: set {where}"
    return f"it refuses user {user} or the password: check {where}"


def with_password(written: str) -> str:
    """Return the whole URI for one that was written down without its user and password."""
    for name in (PRIVATE_URI, "MLFLOW_TRACKING_URI"):
        if redact(os.environ.get(name, "")) == written:
            return os.environ[name]
    return written


def quiet_mlflow() -> None:
    """Set what has to stand in the environment before mlflow is imported: one try, no pickles, no telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_S))


def open_store(uri: str) -> MlflowClient:
    """Return a client on a store that is ready for use; of an empty database one process makes the tables."""
    quiet_mlflow()
    import mlflow
    from filelock import FileLock

    mlflow.set_tracking_uri(uri)  # mlflow-artifacts: and models: addresses resolve against the global one
    path = sqlite_path(uri)
    if path is None:
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    # Simultaneous first starts of MLflow's migrations fail with "duplicate column name", and a database that
    # was left in the middle of them is lost: make them aside, under a lock, and rename.
    with FileLock(f"{path}.lock", timeout=120):
        if not path.exists():
            _make_tables(path)
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_tables(path: Path) -> None:
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    engine = create_sqlalchemy_engine(f"sqlite:///{partial}")
    _initialize_tables(engine)
    engine.dispose()
    partial.replace(path)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Return the experiment's id; it is made, or brought back from the bin, where needed."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifacts(uri, name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was first
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def is_permanent(error: Exception) -> bool:
    """Say whether a store refused this very request, so that sending it again is of no use."""
    if isinstance(error, FileNotFoundError | UserError | KeyError):
        return True
    code: Any = getattr(error, "error_code", None)
    return code in {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}


def one_line(error: BaseException) -> str:
    """Return an error as one short line without secrets."""
    text = redact(str(error)).strip()
    first = text.splitlines()[0] if text else ""
    code = getattr(error, "error_code", None)
    if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return _not_let_in()
    if code == DENIED:
        return refused("the right to this, EDIT on the experiment or the model")
    if "Max retries exceeded" in first or "Connection" in type(error).__name__:
        first = "connection refused or lost"
    elif "timed out" in first.lower():
        first = "no answer in time"
    return f"{type(error).__name__}: {first}"[:400] if first else type(error).__name__


def _artifacts(uri: str, name: str) -> str | None:
    """Return where a SQLite store keeps files: beside the database, whatever folder this process runs in."""
    path = sqlite_path(uri)
    folder = re.sub(r"[^\w.-]+", "-", name)
    return (path.parent / "mlruns" / folder).as_uri() if path else None
