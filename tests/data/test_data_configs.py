"""Every data set of the library is valid and says what it must."""

from pathlib import Path

import pytest
import yaml

from cnn_tuning.config import DataConfig, validate

FILES = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_data_config(path):
    text = path.read_text()
    config = validate(DataConfig, yaml.safe_load(text))
    assert text.startswith("# ") and config.name == path.stem
    remote = [s for s in config.sources if not s.uri.startswith("file:")]
    assert all(f.sha256 or f.md5 or f.unverified for f in config.files.values()) or not remote
    assert all(s.sha256 for s in remote if s.uri.startswith("wheel:"))
    if config.classes:
        assert len(set(config.classes)) == len(config.classes) == 10
