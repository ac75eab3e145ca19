"""What a stage starts from and is recorded with: its data, their hash, the whole locked configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import AMBIENT, LOCK, DiagnosisConfig, flatten
from cnn_tuning.errors import UserError
from cnn_tuning.stages.command import Place

if TYPE_CHECKING:
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.tracking.run import Run

# Recorded with no run: they decide no result (but `diagnosis.stopping`).
UNRECORDED = AMBIENT | {"serving", "host"}


def prepared_data(place: Place) -> PackedData:
    """Return the prepared data, which must be those that were composed."""
    from cnn_tuning.data.packed import PackedData

    data = PackedData.open(place.input(place.prepared))
    if place.data_name not in (None, data.meta.name):
        raise UserError(
            f"{data.path} holds {data.meta.name}, not {place.data_name}: run the stages fetch and preprocess "
            f"with data={place.data_name}, then this one with --inputs {place.outputs}"
        )
    return data


def recorded(own: dict[str, Any], place: Place) -> dict[str, Any]:
    """Return a run's parameters: in the pipeline all that is locked (for the record; a stage computes with
    its own sections only), by hand the stage's own."""
    import yaml

    if not place.is_pipeline:
        return flatten(own)
    locked = yaml.safe_load(LOCK.read_text())
    kept = {name: section for name, section in locked.items() if name not in UNRECORDED}
    return flatten(kept | _stopping(locked["diagnosis"]["stopping"]))


def stopping(diagnosis: DiagnosisConfig) -> dict[str, Any]:
    """Return what of the rules decides a result, as a part of a run's parameters: which may end a training."""
    return _stopping(diagnosis.stopping)


def _stopping(thresholds: Mapping[str, Any]) -> dict[str, Any]:
    return {"diagnosis": {"stopping": dict(thresholds)}} if thresholds else {}


def record_data(tracked: Run, place: Place, data: PackedData, split: str) -> str:
    """Log which data a run uses, and as what; return their digest: in the pipeline the one of `dvc.lock`."""
    digest = data_hash(place.prepared) if place.is_pipeline else data.meta.digest
    tracked.log_dataset(name=data.meta.name, digest=digest, source=str(data.path), split=split)
    return digest


def data_hash(path: Path, lock: Path = Path("dvc.lock")) -> str:
    """Return the MD5 that `dvc.lock` holds for an output, as DVC writes it (a folder's ends in `.dir`).

    Raises:
        UserError: there is no lock file, or no stage in it has that output.
    """
    import yaml

    try:
        stages = yaml.safe_load(lock.read_text())["stages"].values()
        hashes = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
        return hashes[path.as_posix()]
    except (FileNotFoundError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"{lock} does not know {path}: run `dvc repro` first") from None
