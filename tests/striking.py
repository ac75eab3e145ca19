"""Stages run for real and stopped at one point, so that a fault can strike them just there."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from project import Project

POINTS = Path(__file__).parent / "strike_points"
# A checkpoint after each step.
SAVING = ("trainer.max_epochs=2", "trainer.checkpoint_every_s=0.001")


class Struck(Project):
    """A project whose stages can be stopped at a point (see `strike_points`)."""

    def stage(self, name: str, *overrides: str, at: str = "") -> subprocess.Popen[str]:
        """Start a stage by hand, with its outputs where the pipeline has them."""
        command = (sys.executable, "-m", f"cnn_tuning.stages.{name}", *overrides, "--outputs", ".")
        return self.start(*command, **(self.striking(name, at) if at else {}))

    def interrupted(self, name: str, *overrides: str, at: str) -> None:
        """Run a stage by hand up to a point, and end it there with SIGTERM."""
        process = self.stage(name, *overrides, at=at)
        self.reached(process)
        process.send_signal(signal.SIGTERM)
        self.go_on()
        process.communicate(timeout=200)

    def striking(self, stage: str, at: str) -> dict[str, str]:
        """Return the environment in which a stage is stopped at a point."""
        folder = self.path.parent
        for name in ("here", "go"):
            (folder / name).unlink(missing_ok=True)
        return {
            "PYTHONPATH": str(POINTS),
            "STRIKE_STAGE": stage,
            "STRIKE_AT": at,
            "STRIKE_FOLDER": str(folder),
        }

    def reached(self, process: subprocess.Popen[str]) -> psutil.Process:
        """Wait until the stage is at its point, and return it."""
        here = self.path.parent / "here"
        self.until(here.exists, process)
        return psutil.Process(int(here.read_text()))

    def go_on(self) -> None:
        """Let the stage go on from its point."""
        (self.path.parent / "go").touch()

    def until(self, true: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
        """Wait for something to be true while the process lives."""
        deadline = time.monotonic() + 240
        while not (value := true()):
            assert process is None or process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return value

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that work in this project."""
        found = []
        for process in psutil.process_iter():
            try:
                inside = Path(process.cwd()).is_relative_to(self.path)
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                pass
        return found

    def until_nobody_is_left(self) -> None:
        """Wait for every process of this project to end by itself."""
        self.until(lambda: not self.processes())

    def ends(self) -> list[str]:
        """Return how each run in the store ended, oldest first, once all that deliver have left."""
        self.until_nobody_is_left()
        store = sqlite3.connect(self.path / "mlflow.db")
        try:
            return [status for (status,) in store.execute("SELECT status FROM runs ORDER BY start_time")]
        finally:
            store.close()

    def checkpoints(self) -> list[Path]:
        """Return the whole checkpoints of all unfinished trainings, oldest first."""
        return sorted((self.path / ".state").glob("**/step-*.ckpt"))


@pytest.fixture
def by_hand(tmp_path: Path, digits_data: Path) -> Struck:
    """A project with the prepared digits, whose stages are run by hand."""
    project = Struck(tmp_path / "project", "experiment: digits\nseed: 0\n")
    shutil.copytree(digits_data, project.path / "data/prepared")
    shutil.copytree(digits_data.parent / "raw", project.path / "data/raw")
    return project


@pytest.fixture(scope="session")
def _begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = "experiment: digits\nseed: 0\ntrainer: {max_epochs: 2, checkpoint_every_s: 0.001}\n"
    project = Project(tmp_path_factory.mktemp("begun") / "project", params)
    project.repro("fetch_weights", "preprocess")
    project.commit("begun")
    return project.path


@pytest.fixture
def begun(tmp_path: Path, _begun: Path) -> Struck:
    """A project whose pipeline has run up to where training begins."""
    shutil.copytree(_begun, tmp_path / "project", symlinks=True)
    return Struck.at(tmp_path / "project")
