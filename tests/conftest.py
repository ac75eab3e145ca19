"""Shared parts of the tests: MLflow servers on loopback, prepared digits, a project whose pipeline has run."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings
from mlflow_server import MlflowServer
from project import ROOT, Project

from cnn_tuning.config import Recipe, TrackingConfig, compose, select, values
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.sources import fetch

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# Machines are shared: no test fails for being slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest and the shared pipeline, and end with what else asks for it: no worker is to wait.

    Between them the files with most tests come first, as xdist's own order would have it.
    """
    tests = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        waits = any("digits" in getattr(one, "fixturenames", ()) for one in of_file[item.path])
        first = item.path.name in ("test_readme.py", "test_pipeline.py")
        return (0 if first else 2 if waits else 1), -tests[item.path], str(item.path)

    of_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        of_file.setdefault(item.path, []).append(item)
    items.sort(key=place)  # stable: within a file they stay in order


@pytest.fixture(scope="session", autouse=True)
def _shipped_groups_are_composed_once() -> Iterator[None]:
    """Ask Hydra once for the same of `conf/`, which no test changes: a second each time, in hundreds of tests."""
    asked, known = values._composed_by_hydra, {}

    def composed(conf: Path, name: str, arguments: list[str]) -> dict[str, Any]:
        if conf.resolve() != ROOT / "conf":
            return asked(conf, name, arguments)
        key = (name, *arguments)
        if key not in known:
            known[key] = asked(conf, name, arguments)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(values, "_composed_by_hydra", composed)
        yield


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A running server for tests that leave it alive."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def _killable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("killable-server"))
    yield server
    server.kill()


@pytest.fixture
def killable_mlflow_server(_killable: MlflowServer) -> Iterator[MlflowServer]:
    """A running server that a test may stop or kill; the next test finds it running again."""
    if not _killable.answers():
        _killable.start()
    yield _killable
    _killable.signal(signal.SIGCONT)


@pytest.fixture(scope="session")
def _made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: its migrations take seconds."""
    from cnn_tuning.tracking.store import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def store_db(tmp_path: Path, _made_store: Path) -> Path:
    """Return a SQLite store of this test's own, with tables and no runs."""
    return Path(shutil.copy(_made_store, tmp_path / "mlflow.db"))


@pytest.fixture
def tracking(tmp_path: Path, store_db: Path) -> Iterator[Callable[..., TrackingConfig]]:
    """Return a function that makes a tracking configuration; afterwards, wait for its deliverers to leave."""
    spools: set[Path] = set()

    def config(**values: Any) -> TrackingConfig:
        given = {"uri": f"sqlite:///{store_db}", "spool": str(tmp_path / "spool"), **values}
        spools.add(Path(given["spool"]))
        return TrackingConfig(name="test", experiment="tests", **given)

    yield config
    for folder in spools:
        if folder.is_dir():
            with FileLock(folder / "deliver.lock", timeout=60):
                pass


@pytest.fixture
def rows() -> Callable[..., list[tuple]]:
    """Return a function that asks a store's SQLite file itself, whatever a client would make of it."""

    def query(path: Path, sql: str, *values: object) -> list[tuple]:
        assert path.exists()
        # Not read-only: what a killed writer left half-done is rolled back on opening.
        connection = sqlite3.connect(path)
        try:
            return connection.execute(sql, values).fetchall()
        finally:
            connection.close()

    return query


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved MLflow model that answers "seven" to every row."""
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    folder = tmp_path_factory.mktemp("tiny-model")
    code = folder / "seven.py"
    code.write_text(
        "import mlflow, pandas as pd\n"
        "class Seven(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return pd.DataFrame({'label': ['seven'] * len(model_input)})\n"
        "mlflow.models.set_model(Seven())\n"
    )
    signature = infer_signature(pd.DataFrame({"image": ["a"]}), pd.DataFrame({"label": ["b"]}))
    mlflow.pyfunc.save_model(folder / "model", python_model=code, signature=signature, pip_requirements=["mlflow"])
    return folder / "model"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project whose pipeline has run on the real digits; shared by all workers, not to be changed."""
    shared = _shared(tmp_path_factory) / "digits"
    with FileLock(f"{shared}.lock"):
        if not (shared / "printed.txt").exists():
            shutil.rmtree(shared, ignore_errors=True)
            project = Project(shared / "project", "experiment: digits\nseed: 0\n")
            (shared / "printed.txt").write_text(project.repro())
    return Project.at(shared / "project", (shared / "printed.txt").read_text())


@pytest.fixture(scope="session")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the prepared digits."""
    folder = _shared(tmp_path_factory) / "digits-data"
    data = compose(["experiment=digits"], params=None, conf=ROOT / "conf").data
    with FileLock(f"{folder}.lock"):
        if not (folder / "prepared/meta.json").exists():
            fetch(data, folder / "raw", cache=folder / "cache")
            prepare(data, folder / "raw", folder / "prepared", seed=0)
    return folder / "prepared"


@pytest.fixture(scope="session")
def packed(digits_data: Path) -> PackedData:
    """Return the prepared digits."""
    return PackedData.open(digits_data)


@pytest.fixture
def recipe() -> Recipe:
    """Return the recipe of the digits experiment."""
    return select(Recipe, compose(["experiment=digits"], params=None, conf=ROOT / "conf"))


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of this test session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI has to have Chromium"
        pytest.skip("no Chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()
