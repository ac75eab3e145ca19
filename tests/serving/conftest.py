"""A tiny seeded model in its three forms (network, bundle, MLflow model), pictures, and a running front."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live as servers
import numpy as np
import pytest
from moto_server import serving
from renting import command, credentials, folder, no_aws  # noqa: F401


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A network and its bundle."""
    place = tmp_path_factory.mktemp("serving") / "bundle"
    return servers.make_bundle(place), place


@pytest.fixture(scope="session")
def bundle(trained: tuple[Any, Path]) -> Path:
    """The bundle's folder."""
    return trained[1]


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Eight different images, uint8 N×1×28×28."""
    return servers.noise_images(8)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """A server of moto on the loopback."""
    with serving() as url:
        yield url


@pytest.fixture(scope="session")
def mlflow_model(bundle: Path, digits: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a saved MLflow model."""
    from cnn_tuning.serving import pyfunc

    place = tmp_path_factory.mktemp("mlflow") / "model"
    pyfunc.save(bundle, place, digits[0])
    return place


@pytest.fixture(scope="session")
def live(bundle: Path) -> Iterator[servers.Live]:
    """A front around the bundle, with default limits."""
    with servers.front(bundle) as server:
        yield server


@pytest.fixture
def registry(folder: Path, store_db: Path, mlflow_model: Path) -> Any:  # noqa: F811
    """A client on a store with a champion, which the project names where the command runs."""
    from cnn_tuning.tracking.store import open_store

    params = folder / "params.yaml"
    params.write_text(f"{params.read_text()}tracking: {{uri: 'sqlite:///{store_db}'}}\n")
    client = open_store(f"sqlite:///{store_db}")
    client.create_registered_model("mnist-classifier")
    client.create_model_version("mnist-classifier", str(mlflow_model))
    client.set_registered_model_alias("mnist-classifier", "champion", "1")
    return client
