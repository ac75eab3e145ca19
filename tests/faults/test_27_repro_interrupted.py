"""Row 27: `dvc repro` interrupted in each stage; the next one resumes, no orphan process is left."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import psutil
import pytest
import yaml
from striking import Struck

PARAMS = """\
experiment: digits
seed: 0
trainer: {max_epochs: 6, checkpoint_every_s: 0.001}
ablation: {questions: {dropout: {settings: {trainer.max_epochs: 2}}}}
search: {budget: {trials: 2}, settings: {trainer.max_epochs: 3}}
"""
# What each stage's process group is sent. DVC ignores a Ctrl-C while a stage runs: one that is over in a moment
# may miss it.
HITS = {
    "configure": signal.SIGTERM,
    "fetch": signal.SIGKILL,
    "preprocess": signal.SIGTERM,
    "fetch_weights": signal.SIGTERM,
    "train": signal.SIGINT,
    "ablate": signal.SIGTERM,
    "tune": signal.SIGKILL,
    "diagnose": signal.SIGINT,
    "evaluate": signal.SIGTERM,
}
TRAINING = ("train", "ablate", "tune")
# What the run that is interrupted in a stage has gone on from before: the training of the stage before it.
LEFT = {"ablate": ".state/train", "tune": ".state/arms"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_27_each_stage_is_interrupted_and_the_next_run_goes_on(tmp_path):
    project = Struck(tmp_path / "project", PARAMS)
    assert set(HITS) == set(yaml.safe_load(project.text("dvc.yaml"))["stages"])
    before: set[str] = set()
    for stage, signum in HITS.items():
        process = project.start("dvc", "repro")
        project.until(lambda stage=stage: at_work(project, stage), process)
        os.killpg(process.pid, signum)
        printed, _ = process.communicate(timeout=200)
        assert process.returncode, printed
        assert f"Running stage '{stage}'" in printed  # the fault is real: it had begun
        project.until_nobody_is_left()
        if stage in LEFT:
            assert f"going on from {LEFT[stage]}" in printed
        if stage == "diagnose":  # which ran after what was left of `tune`
            logs = (project.path / ".state/search").glob("worker-*.log")
            assert "going on from .state/search" in "".join(log.read_text() for log in logs)
        done = finished(project)
        assert stage not in done
        assert before <= done
        before = done
    project.repro()
    assert "evaluate" in finished(project)
    assert "up to date" in project.run("dvc", "status")
    ends = project.ends()
    assert "RUNNING" not in ends
    assert ends[-1] == "FINISHED"
    assert not list(project.path.rglob("*.partial"))


def at_work(project: Struck, stage: str) -> bool:
    """Say whether a stage runs; one that trains has also to have saved something."""
    running = False
    for process in project.processes():
        with suppress(psutil.NoSuchProcess):
            running = running or f"cnn_tuning.stages.{stage}" in process.cmdline()
    return running and (stage not in TRAINING or bool(project.checkpoints()))


def finished(project: Struck) -> set[str]:
    """Return the stages that dvc.lock tells to be done."""
    path = project.path / "dvc.lock"
    return set(yaml.safe_load(path.read_text())["stages"]) if path.exists() else set()
