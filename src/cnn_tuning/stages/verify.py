"""Prove that training repeats itself: fit again from `params.lock.yaml` and compare with `dvc.lock`."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import click

from cnn_tuning import config
from cnn_tuning.errors import UserError
from cnn_tuning.stages import train
from cnn_tuning.stages.command import Place, prepare_process
from cnn_tuning.stages.lineage import data_hash

SCRATCH = Path("scratch/verify")


def folder_hash(folder: Path) -> str:
    """Return a folder's hash as DVC 3 writes it to `dvc.lock`: the MD5 of its sorted list of files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = [{"md5": _md5(p), "relpath": p.relative_to(folder).as_posix()} for p in files]
    listing = json.dumps(sorted(entries, key=lambda e: e["relpath"]), sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def verify() -> None:
    """Train the locked configuration again below `scratch/` and compare every byte.

    Raises:
        UserError: names the files that differ; or `dvc.lock` does not know the model.
    """
    prepare_process()
    expected = data_hash(Path("models/baseline"))
    locked = config.load_locked(train.TrainConfig)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    train.run(locked, Place(Path(), SCRATCH), kind="verify")
    again = SCRATCH / "models/baseline"
    found = folder_hash(again)
    if found == expected:
        click.echo(f"identical: training again gives {found}, as dvc.lock says")
        return
    was = Path("models/baseline")
    differ = [p.name for p in sorted(again.iterdir()) if not _same(p, was / p.name)]
    print(f"dvc.lock: {expected}\nagain:    {found}", file=sys.stderr)
    raise UserError(
        f"training again gives other bytes in {', '.join(differ) or 'models/baseline, which itself was changed'}; "
        "thread count, processor or code differ from those of the recorded run (see `cnn-tuning show`)"
    )


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
