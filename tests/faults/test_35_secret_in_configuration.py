"""Row 35: a secret in the configuration reaches neither the committed lock file nor any message."""

from __future__ import annotations

from pathlib import Path

import pytest
from project import Project

from cnn_tuning.config import compose, lock_text
from cnn_tuning.errors import UserError

CONF = Path(__file__).parents[2] / "conf"
CANARY = "c4n4ry-Pa55"


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri='https://me:{CANARY}@mlflow.example.org'",
        f"data.sources=[{{uri: 'https://me:{CANARY}@data.example.org/x/'}}]",
    ],
)
def test_35_a_secret_is_not_locked(override):
    composed = compose([override], params=None, conf=CONF)
    with pytest.raises(UserError) as refused:
        lock_text(composed)
    assert "holds a secret" in str(refused.value)
    assert override.split("=")[0] in str(refused.value)
    assert CANARY not in str(refused.value)


def test_35_a_wrong_value_is_shown_without_its_secret():
    with pytest.raises(UserError) as refused:
        compose([f"tracking.wait_s='https://me:{CANARY}@x.example.org'"], params=None, conf=CONF)
    assert "tracking.wait_s" in str(refused.value)
    assert CANARY not in str(refused.value)


def test_35_the_stage_configure_leaves_no_trace(tmp_path):
    params = f"experiment: digits\ntracking: {{uri: 'https://me:{CANARY}@mlflow.example.org'}}\n"
    project = Project(tmp_path / "project", params)
    printed = project.run("dvc", "repro", "configure", fails=True)
    assert "holds a secret" in printed
    assert CANARY not in printed
    kept = [
        p for p in project.path.rglob("*") if p.is_file() and p.name != "params.yaml" and ".git/" not in str(p)
    ]
    assert [p for p in kept if CANARY.encode() in p.read_bytes()] == []
