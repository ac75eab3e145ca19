"""From what a person names (a folder, or a run in the store) to the training that it was."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cnn_tuning.config import Recipe, TrackingConfig, validate
from cnn_tuning.diagnosis.recording import RECIPE, SWEEP, TIMES, Recording, read_recording
from cnn_tuning.errors import UserError
from cnn_tuning.tracking import store

# Where times and range test of a model in `models/NAME` are, beside that folder.
SHEETS = {"baseline": "results/training", "tuned": "results/search/refit"}


@dataclass(frozen=True)
class Training:
    """A training that was recorded."""

    recipe: Recipe
    recording: Recording


def find(run: str, tracking: TrackingConfig) -> Training:
    """Return the training behind a model's folder, or behind a run's id or `runs:/ID`.

    Raises:
        UserError: there is none, or it recorded nothing.
    """
    folder = Path(run)
    if folder.is_dir():
        return training_in(folder, _sheet_of(folder))
    identity = run.removeprefix("runs:/")
    if not re.fullmatch(r"[0-9a-f]{32}", identity):
        raise UserError(f"{run!r} is neither a model's folder nor a run: give models/baseline, or a run's id")
    with tempfile.TemporaryDirectory() as scratch:
        _download(identity, Path(scratch), tracking)
        return training_in(Path(scratch), Path(scratch), run)


def _sheet_of(model: Path) -> Path:
    whole = model.resolve()
    if whole.parent.name == "models" and whole.name in SHEETS:
        return whole.parents[1] / SHEETS[whole.name]
    return model


def training_in(model: Path, sheet: Path, name: str = "") -> Training:
    """Return the training whose model and recording are in one folder, times and range test in another."""
    try:
        recipe = validate(Recipe, json.loads((model / RECIPE).read_text()))
    except (OSError, ValueError):
        raise UserError(f"{name or model} holds no {RECIPE}: it is no training of ours") from None
    return Training(recipe, read_recording(model / "recording", sheet))


def _download(identity: str, folder: Path, tracking: TrackingConfig) -> None:
    """Bring what a run has of its training into one folder."""
    uri = store.tracking_uri(tracking)
    problem = store.problem_of(uri)
    if problem:
        raise UserError(f"tracking store {uri} is not reachable ({problem}): start it or set tracking.uri")
    client = store.open_store(uri)
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(identity)
    except MlflowException:
        raise UserError(f"no run {identity} in {uri}: see `mlflow ui`, or set tracking.uri") from None
    names = {entry.path for folder in ("model", "diagnosis") for entry in client.list_artifacts(identity, folder)}
    for name in (f"model/{RECIPE}", "model/recording", f"diagnosis/{TIMES}", f"diagnosis/{SWEEP}"):
        if name in names:
            client.download_artifacts(identity, name, str(folder))
