"""A registered model whose files were replaced after registration is not served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import live as servers
import pytest

from cnn_tuning.data.digests import sha256_of
from cnn_tuning.errors import UserError
from cnn_tuning.serving.server import find
from cnn_tuning.tracking.registry import BUNDLE_TAG


@pytest.mark.parametrize("named", ["models:/shown@champion", "models:/shown/1"])
def test_other_files_than_were_registered_are_refused(tmp_path: Path, store_db: Path, mlflow_model: Path, named):
    from cnn_tuning.tracking.store import open_store

    uri, files = f"sqlite:///{store_db}", shutil.copytree(mlflow_model, tmp_path / "artifacts")
    bundle = next(files.rglob("model.json")).parent
    client = open_store(uri)
    client.create_registered_model("shown")
    tags = {BUNDLE_TAG: sha256_of(bundle / "model.json")}
    client.create_model_version("shown", str(files), tags=tags)
    client.set_registered_model_alias("shown", "champion", "1")
    assert json.loads((find(named, uri).bundle / "model.json").read_text())["classes"][0] == "zero"
    shutil.rmtree(bundle)
    servers.make_bundle(bundle, seed=5)  # whole in itself, and of somebody else
    with pytest.raises(UserError, match="not those that were registered"):
        find(named, uri)
