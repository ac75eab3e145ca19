"""A tiny seeded model in its three forms (network, bundle, MLflow model), pictures, and a running front."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live as servers
import numpy as np
import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A network and its bundle."""
    folder = tmp_path_factory.mktemp("serving") / "bundle"
    return servers.make_bundle(folder), folder


@pytest.fixture(scope="session")
def bundle(trained: tuple[Any, Path]) -> Path:
    """The bundle's folder."""
    return trained[1]


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Eight different images, uint8 N×1×28×28."""
    return servers.noise_images(8)


@pytest.fixture(scope="session")
def mlflow_model(bundle: Path, digits: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a saved MLflow model."""
    from cnn_tuning.serving import pyfunc

    folder = tmp_path_factory.mktemp("mlflow") / "model"
    pyfunc.save(bundle, folder, digits[0])
    return folder


@pytest.fixture(scope="session")
def live(bundle: Path) -> Iterator[servers.Live]:
    """A front around the bundle, with default limits."""
    with servers.front(bundle) as server:
        yield server
