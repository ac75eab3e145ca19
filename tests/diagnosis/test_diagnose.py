"""From a training to its findings and a proven remedy, as a person sees them."""

from __future__ import annotations

import gzip
import html
import importlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import numpy as np
import pytest
from curve_recordings import recording as curve_recording
from project import ROOT, Project
from pytorch_lightning.callbacks import Callback
from training_recipes import recipe_with

from cnn_tuning.config import DiagnosisConfig, RuleConfig, compose
from cnn_tuning.diagnosis.judge import judge
from cnn_tuning.diagnosis.record import record_training
from cnn_tuning.diagnosis.recording import Sweep, read_recording, write_recording
from cnn_tuning.diagnosis.source import find
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.errors import UserError
from cnn_tuning.stages import fitting
from cnn_tuning.stages.diagnosing import _trained_on
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.fit import Diverged, fit
from cnn_tuning.training.start import say_once

sys.path.append(str(ROOT / "bench"))
sickness = importlib.import_module("sickness")

CONFIG = compose(["experiment=digits"], params=None)
SHIPPED, TRACKING = CONFIG.diagnosis, CONFIG.tracking
ALWAYS = RuleConfig("stop", {"ratio": 1.0})


def test_a_rule_that_may_stop_ends_the_training(packed, tmp_path, capsys):
    def fitted(action: str):
        rule = RuleConfig(action, SHIPPED.rules["loss_not_decreasing"].thresholds)
        recipe = recipe_with(["optimizer.learning_rate=1e-7", "trainer.max_epochs=6"])
        watch = Watch(recipe, DiagnosisConfig("t", rules={"loss_not_decreasing": rule}), "train")
        done = fit(recipe, packed, state_folder=tmp_path / action, callbacks=watch.callbacks)
        return watch, len(done.history)

    watch, epochs = fitted("stop")
    assert watch.stopped_by == "loss_not_decreasing"
    assert epochs < 6
    assert "loss_not_decreasing" in (told := capsys.readouterr().err)
    assert "the training stops here" in told
    watch, epochs = fitted("warn")
    assert (watch.stopped_by, epochs) == ("", 6)
    assert capsys.readouterr().err.count("loss_not_decreasing:") == 1  # told once
    assert fitted("off")[1] == 6
    assert "loss_not_decreasing" not in capsys.readouterr().err


def test_a_recording_read_back_gives_the_same_findings(packed, tmp_path):
    recipe = recipe_with(["trainer.max_epochs=2"])
    watch = Watch(recipe, SHIPPED, "train")
    recording = watch.conclude(fit(recipe, packed, state_folder=tmp_path, callbacks=watch.callbacks), packed)
    write_recording(recording, tmp_path / "one")
    write_recording(recording, tmp_path / "two")
    kept = read_recording(tmp_path / "one")
    without_times = list(judge(kept, SHIPPED))
    again = list(judge(read_recording(tmp_path / "two"), SHIPPED))
    assert without_times == again
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert kept.curves.data_digest == packed.meta.digest
    (tmp_path / "one/curves.npz").write_bytes(b"cut")
    with pytest.raises(UserError, match="train again"):
        read_recording(tmp_path / "one")


@pytest.mark.parametrize("where", ["models/baseline", "elsewhere"])
def test_the_range_test_of_a_training_is_kept_beside_its_times(tmp_path, where):
    recipe, model = recipe_with([]), tmp_path / where
    sheet = tmp_path / "results/training" if where.startswith("models") else model
    sweep = Sweep(np.geomspace(1e-6, 1, 5, dtype=np.float32), np.ones(5, np.float32))
    model.mkdir(parents=True)
    sheet.mkdir(parents=True, exist_ok=True)
    written = replace(curve_recording([2.3] * 30), sweep=sweep)
    record_training(MagicMock(Run), model, sheet, recipe, written, [])
    assert not (model / "recording/sweep.npz").exists()  # its bytes are the device's, too
    back = find(str(model), TRACKING).recording.sweep
    np.testing.assert_array_equal(back.learning_rate, sweep.learning_rate)


def test_a_training_that_left_no_data_is_held_against_its_data_too(packed):
    """As of one that diverged: curves alone are left."""
    recording = curve_recording([2.3] * 30)
    assert _trained_on(packed, recording)  # an older one, of which nothing is known
    for digest, same in ((packed.meta.digest, True), ("0" * 32, False)):
        known = replace(recording, curves=replace(recording.curves, data_digest=digest))
        assert _trained_on(packed, known) is same


class BreaksAt(Callback):
    """Spoils a network's weights after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            next(module.network.parameters()).data.fill_(np.nan)


def test_a_training_that_diverged_shows_its_operators(packed, tmp_path, monkeypatch):
    def breaks(*positional, callbacks, **named):
        return fit(*positional, callbacks=[*callbacks, BreaksAt(20)], **named)

    monkeypatch.setattr(fitting, "fit", breaks)
    out, sheet = tmp_path / "out", tmp_path / "sheet"
    out.mkdir()
    sheet.mkdir()
    tracked = MagicMock(Run)
    tracked.system_samples.return_value = []
    with pytest.raises(Diverged):
        fitting.fit_to_folder(
            recipe_with(["trainer.profile=true"]), packed, out, sheet,
            diagnosis=SHIPPED, state=tmp_path / "state", tracked=tracked, name="train",
        )  # fmt: skip
    assert "convolution" in _operators(sheet)


@pytest.mark.parametrize(("profile", "lines"), [("true", 1), ("false", 0)])
def test_that_compared_trainings_are_not_traced_is_said_once(profile, lines, capsys):
    say_once.cache_clear()
    for _ in range(2):
        Watch(recipe_with([f"trainer.profile={profile}"]), SHIPPED, "arm", stops=False)
    assert capsys.readouterr().err.count("are not traced") == lines


def _operators(sheet: Path) -> str:
    """Return the operators of a traced training, which its page shows and a trace comes with."""
    trace = json.loads(gzip.decompress((sheet / "trace.json.gz").read_bytes()))
    assert {"forward", "backward", "optimiser"} <= {event.get("name") for event in trace["traceEvents"]}
    told = (sheet / "operators.csv").read_text()
    page = (sheet / "profile.html").read_text()
    assert "<h2>Operators</h2>" in page
    assert html.escape(told.splitlines()[1].split(",")[0]) in page
    return told


def test_mistakes_in_rules_are_told_together(packed):
    rules = {"overfiting": ALWAYS, "class_imbalance": RuleConfig("stop", {"ration": 2.0})}
    with pytest.raises(UserError) as told:
        Watch(recipe_with([]), DiagnosisConfig("t", rules=rules), "train")
    for part in (
        "did you mean 'overfitting'",
        "did you mean 'ratio'",
        "thresholds.ratio: missing",
        "judged at the end",
    ):
        assert part in str(told.value)


@pytest.fixture(scope="module")
def sick(digits, tmp_path_factory) -> Project:
    """The project with a traced training by hand whose learning rate is far too low."""
    project = _copy_of(digits, tmp_path_factory.mktemp("sick") / "project")
    project.printed = project.run(
        *("python", "-m", "cnn_tuning.stages.train", "optimizer.learning_rate=1e-5", "trainer.max_epochs=4"),
        "trainer.profile=true",
    )
    return project


def _copy_of(project: Project, path: Path) -> Project:
    shutil.copytree(project.path, path, symlinks=True)
    return Project.at(path)


@pytest.mark.slow
def test_findings_show_in_the_terminal_and_in_the_run(sick, rows):
    assert "learning_rate_too_low" in sick.printed
    assert "convolution" in _operators(sick.path / "scratch/results/training")
    found = json.loads(sick.run("cnn-tuning", "diagnose", "scratch/models/baseline", "--json"))
    fired = {entry["rule"]: entry for entry in found if entry["status"] == "fired"}
    assert 1e-4 < fired["learning_rate_too_low"]["remedy"]["optimizer.learning_rate"] < 0.1
    assert {entry["status"] for entry in found} == {"fired", "ok", "not evaluated"}
    assert not [entry for entry in found if "no times were recorded" in entry["explanation"]]
    runs = sick.run("mlflow", "runs", "list", "--experiment-id", "1", MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    run = re.search(r"([0-9a-f]{32})", runs.splitlines()[2])[1]
    told = sick.run("cnn-tuning", "diagnose", run)
    assert "learning_rate_too_low" in told
    assert "cnn-tuning cure" in told
    ((place,),) = rows(sick.path / "mlflow.db", "select artifact_uri from runs where run_uuid = ?", run)
    kept = {file.name for file in Path(urlsplit(place).path, "diagnosis").iterdir()}
    assert {"findings.json", "profile.html", "times.npz"} <= kept
    tags = dict(rows(sick.path / "mlflow.db", "select key, value from tags where run_uuid = ?", run))
    assert "learning_rate_too_low" in tags["findings"]
    assert tags["finding.learning_rate_too_low"] == fired["learning_rate_too_low"]["explanation"][:450]


@pytest.mark.slow
def test_a_training_that_diverged_is_diagnosed_too(sick):
    command = ("python", "-m", "cnn_tuning.stages.train", "optimizer.learning_rate=1e9", "trainer.max_epochs=2")
    assert "no longer finite" in sick.run(*command, "--outputs", "scratch/broken", fails=True)
    told = sick.run("cnn-tuning", "diagnose", "scratch/broken/models/baseline")
    assert re.search(r"fired +not_finite", told)
    assert "samples a second" in (sick.path / "scratch/broken/results/training/profile.html").read_text()


@pytest.mark.slow
def test_a_remedy_is_proved_by_training_with_and_without_it(sick):
    command = ("cnn-tuning", "cure", "scratch/models/baseline", "--rule", "learning_rate_too_low", "--seeds", "2")
    told = sick.run(*command)
    gain = re.search(r"(?:gains|gain in accuracy,) ([\d.]+) points", told)
    assert float(gain[1]) > 50
    assert re.search(r"\[-?[\d.]+, [\d.]+\]", told)  # with an interval
    assert "learning_rate_too_low fires on 2 of 2 as it was, on 0 of 2 with the remedy" in told
    assert told.count("are not traced") == 1
    assert (sick.path / "scratch/cure/learning_rate_too_low/arms.csv").exists()
    assert "1/4" not in sick.run(*command)  # nothing is trained twice


@pytest.mark.slow
def test_dropout_is_proved_to_lower_the_gap_of_a_training_that_overfits(digits, tmp_path):
    project = _copy_of(digits, tmp_path / "project")
    (case,) = [case for case in sickness.SICK if case.name == "few images learnt by heart"]
    sickness.data_of(case.data, tmp_path)
    shutil.rmtree(project.path / "data/prepared")
    shutil.copytree(tmp_path / case.data, project.path / "data/prepared")
    project.run("python", "-m", "cnn_tuning.stages.train", *case.overrides)
    told = project.run("cnn-tuning", "cure", "scratch/models/baseline", "--rule", "overfitting", "--seeds", "3")
    assert "remedy: model.dropout=both" in told
    assert "overfitting fires on 3 of 3 as it was" in told
    low, high = map(float, re.search(r"it lowers the gap in loss by [\d.]+ \[([\d.]+), ([\d.]+)\]", told).groups())
    assert 0 < low < high


@pytest.mark.slow
def test_what_cannot_be_diagnosed_or_cured_is_told_in_a_line(sick):
    other = sick.path / "scratch/other"
    shutil.copytree(sick.path / "data/prepared", other)
    labels = np.load(other / "val/labels.npy")
    (other / "val/labels.npy").unlink()
    np.save(other / "val/labels.npy", labels[::-1])
    for command, expected in (
        (("cure", "scratch/models/baseline", "--data", "scratch/other"), "is not what"),
        (("diagnose", "nothing"), "neither a model's folder nor a run"),
        (("diagnose", "a" * 32), "no run"),
        (("diagnose", "conf"), "no training of ours"),
        (("cure", "scratch/models/baseline", "--rule", "dead_relus"), "has not fired"),
    ):
        told = sick.run("cnn-tuning", *command, fails=True)
        assert expected in told
        assert "Traceback" not in told
