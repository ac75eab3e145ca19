"""Small real data and the digits recipe for tests of `fit`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnn_tuning.config import Recipe, compose, select
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.sources import fetch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def composed():
    return compose(["experiment=digits"], params=None, conf=ROOT / "conf")


@pytest.fixture(scope="session")
def packed(composed, tmp_path_factory) -> PackedData:
    folder = tmp_path_factory.mktemp("digits-data")
    fetch(composed.data, folder / "raw", cache=folder / "cache")
    prepare(composed.data, folder / "raw", folder / "prepared", seed=0)
    return PackedData.open(folder / "prepared")


@pytest.fixture
def recipe(composed) -> Recipe:
    return select(Recipe, composed)
