"""The stage `evaluate` beside a pipeline that has run: what the registry refuses, and which models it takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cnn_tuning import config
from cnn_tuning.errors import UserError
from cnn_tuning.reports.summary import print_summary
from cnn_tuning.stages import diagnose, evaluate
from cnn_tuning.stages.command import Place

pytestmark = pytest.mark.slow
MODELS = ("models", "results/training", "results/search", "results/data")


@pytest.fixture
def here(digits, tmp_path, monkeypatch, store_db):
    """A folder with the files of the pipeline that `evaluate` reads, and a store of its own."""
    for name in (*MODELS, "results/ablation", "results/diagnosis", "data/prepared"):
        shutil.copytree(digits.path / name, tmp_path / name)
    for name in ("params.lock.yaml", "dvc.lock"):
        shutil.copy(digits.path / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings(here, tracking):
    """Return what the stage reads, with the store of the test."""
    return replace(config.load_locked(evaluate.EvaluateConfig), tracking=tracking(wait_s=60.0))


def test_a_registration_that_the_store_refuses_fails_the_stage_and_is_told_everywhere(
    here, settings, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    refused = replace(settings, registry=replace(settings.registry, model="a/b"))
    with pytest.raises(UserError, match=r"^a/b: not registered: [^\n]*a/b[^\n]*$") as caught:
        evaluate.run(refused, Place(Path(), Path()))
    reason = str(caught.value).removeprefix("a/b: ")
    registered = json.loads(Path("results/evaluation/registration.json").read_text())
    assert {model["reason"] for model in registered.values()} == {reason}
    page = Path("results/evaluation/report.html").read_text()
    assert "not registered: " in page
    assert "made by hand" not in page
    capsys.readouterr()
    print_summary(Path("results"))
    told = " ".join(capsys.readouterr().out.split())
    assert f"a/b: {reason}" in told
    assert "store was away" not in told


def test_by_hand_the_pipelines_tuned_model_is_not_compared_with_another_baseline(here, settings, capsys):
    scratch = Path("scratch")
    for name in ("models/baseline", "results/training"):
        shutil.copytree(name, scratch / name)
    evaluate.run(settings, Place(scratch, scratch, "digits"))
    diagnose.run(config.load_locked(diagnose.DiagnoseConfig), Place(scratch, scratch, "digits"))
    told = capsys.readouterr().out
    assert "baseline: test/accuracy" in told
    assert "tuned" not in told
    assert "registered" not in told
    assert set(json.loads((scratch / "results/evaluation/registration.json").read_text())) == {"baseline"}


def test_by_hand_a_tuned_model_is_compared_with_the_pipelines_baseline(here, settings, capsys):
    shutil.copytree("models/tuned", "scratch/models/tuned")
    shutil.copytree("results/search", "scratch/results/search")
    shutil.rmtree("models/tuned")
    evaluate.run(settings, Place(Path("scratch"), Path("scratch"), "digits"))
    assert "tuned: test/accuracy" in capsys.readouterr().out
