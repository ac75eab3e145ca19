"""Worker processes: what they are given and what is told of their end."""

from __future__ import annotations

import pytest
from searching import search_with
from training_recipes import recipe_with

from cnn_tuning.config import DiagnosisConfig, TrackingConfig
from cnn_tuning.search import staff
from cnn_tuning.search.staff import Staff
from cnn_tuning.search.worker import Spec


@pytest.fixture
def hire(tmp_path, monkeypatch):
    """Return a function that runs a script instead of the worker, so many times side by side."""

    def hire(script, size=1, devices=1):
        monkeypatch.setattr(staff, "COMMAND", ["/bin/sh", "-c", script])
        tracking = TrackingConfig(name="t", experiment="t")
        spec = Spec(
            search_with(),
            recipe_with([f"trainer.devices={devices}"]),
            DiagnosisConfig("none"),
            tracking,
            "study",
            str(tmp_path),
            "data",
            "key",
            1,
        )
        hired = Staff(size, tmp_path, spec)
        for _ in range(size):
            hired.hire()
        hired.wait()
        return hired.left

    return hire


@pytest.mark.parametrize(
    ("script", "fate"),
    [
        ("cat > /dev/null; echo a >&2; echo 'error: no disk' >&2; exit 1", "ended with status 1 (no disk)"),
        ("exit 3", "ended with status 3 (it printed nothing)"),
        ("kill -KILL $$", "was ended by SIGKILL"),
    ],
)
def test_it_is_told_how_a_worker_ended(hire, script, fate):
    (worker,) = hire(script)
    assert worker.fate() == fate


def test_the_specification_reaches_it(hire, tmp_path):
    (worker,) = hire("cat")
    assert '"study": "study"' in worker.log.read_text()


@pytest.mark.parametrize(
    ("size", "devices", "shown", "given"),
    [
        (3, 1, "0,2", ["0", "2", "0"]),
        (1, 1, "0,2", ["0,2"]),
        (2, 1, "1", ["1", "1"]),
        (2, 1, "", ["", ""]),
        (3, 2, "0,1,2,3,4", ["0,1", "2,3", "0,1"]),
        (2, 2, "4,5", ["4,5", "4,5"]),
        (2, 3, "0,1", ["0,1", "0,1"]),
        (2, "auto", "0,1", ["0", "1"]),
    ],
)
def test_workers_side_by_side_have_gpus_of_their_own(hire, monkeypatch, size, devices, shown, given):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    workers = hire("cat > /dev/null; echo $CUDA_VISIBLE_DEVICES", size, devices)
    assert [w.log.read_text().strip() for w in sorted(workers, key=lambda w: w.place)] == given
