"""Training, ablation and search where there is no test split, and cut off: each stage is one run all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from project import ROOT

from cnn_tuning.config import compose, select
from cnn_tuning.stages import ablate, train, tune
from cnn_tuning.stages.command import Place
from cnn_tuning.tracking.spool import keys, start_of

TINY = (
    "experiment=digits",
    "trainer.max_epochs=1",
    "trainer.batch_size=256",
    "ablation.questions.dropout.seeds=1",
    "search.budget.trials=2",
    "search.settings={trainer.max_epochs: 1}",
    "search.refit_seeds=1",
    "search.workers=1",
    "tracking.wait_s=0.1",
)


@pytest.fixture
def here(tmp_path, digits_data, store_db, monkeypatch) -> Path:
    """A project's folder with prepared digits and no test split."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    shutil.copytree(digits_data, tmp_path / "data/prepared", ignore=shutil.ignore_patterns("test"))
    assert not (tmp_path / "data/prepared/test").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_db}")
    yield tmp_path
    with FileLock(tmp_path / ".state/spool/deliver.lock", timeout=60):
        pass


def run(stage, kind) -> None:
    whole = compose([*TINY, "tracking.spool=.state/spool"], params=None)
    stage.run(select(kind, whole), Place(Path(), Path("scratch"), whole.data.name))


def cut_off_once(monkeypatch, module: str) -> None:
    """Have a stage end as by SIGTERM when all is trained, the first time."""
    import importlib

    room = importlib.import_module(module)
    whole = room.write_outcome

    def cut_off(*values, **more):
        monkeypatch.setattr(room, "write_outcome", whole)
        raise SystemExit(143)

    monkeypatch.setattr(room, "write_outcome", cut_off)


def kinds(folder: Path) -> list[tuple[str, str | None]]:
    """Return kind and parent of each run, but the trials, oldest first."""
    starts = [start_of(folder / ".state/spool", key) for key in keys(folder / ".state/spool")]
    return [(start["kind"], start["parent"]) for start in starts if start["kind"] != "trial"]


@pytest.mark.slow
def test_training_and_ablation_know_no_test_split(here, monkeypatch):
    run(train, train.TrainConfig)
    assert json.loads((here / "scratch/models/baseline/best.json").read_text())["val/accuracy"] > 0.1
    cut_off_once(monkeypatch, "cnn_tuning.ablation.outcome")
    with pytest.raises(SystemExit):
        run(ablate, ablate.AblateConfig)
    run(ablate, ablate.AblateConfig)
    assert "the test split was not opened" in (here / "scratch/results/ablation/report.html").read_text()
    told = kinds(here)
    assert sorted(kind for kind, _ in told) == ["ablate", *["arm"] * 4, "train"]
    assert len({parent for kind, parent in told if kind == "arm"}) == 1


@pytest.mark.slow
def test_a_search_knows_no_test_split(here, monkeypatch):
    cut_off_once(monkeypatch, "cnn_tuning.search.outcome")
    with pytest.raises(SystemExit):
        run(tune, tune.TuneConfig)
    run(tune, tune.TuneConfig)
    assert (here / "scratch/models/tuned/model.json").is_file()
    assert sorted(kind for kind, _ in kinds(here)) == ["refit", "tune"]
