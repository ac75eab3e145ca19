"""What a replacement of a host goes on from: an archive of the unfinished work up, or down.

`checkpoints/NNNN-ATTEMPT.tar.gz` holds the files that Git and DVC do not bring: `dvc.lock`, `params.lock.yaml` and
`.state/` (trainings, arms, searches, spool), without caches that are computed again. `checkpoints/latest.json`
names the newest with its SHA-256, and the one before; it is written last, in one put. The environment and DVC's
configuration are never part of it.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnn_tuning.cloud.runfolder import RunFolder
from cnn_tuning.errors import UserError

LATEST = "checkpoints/latest.json"
SINGLE = ("dvc.lock", "params.lock.yaml")
STATE = Path(".state")
# Of living processes, of the laptop, or made again at once.
_LEFT_OUT = {"deliver.lock", "study.lock", "journal.flock", "hosts", "hosts.jsonl", "registering"}
# A cache, which can be larger than all the rest (`training.features`), and the laptop's clusters.
_NEVER = {"features", "clusters"}
_APPENDED = (".jsonl", ".log")


def files_of(project: Path) -> Iterator[Path]:
    """Yield what belongs into an archive, relative to the project."""
    for name in SINGLE:
        if (project / name).is_file():
            yield Path(name)
    tops = [top for top in sorted((project / STATE).glob("*")) if top.name not in _NEVER and not top.is_symlink()]
    for path in (found for top in tops for found in (top, *sorted(top.rglob("*")))):
        inside = path.relative_to(project)
        left_out = path.suffix == ".partial" or _LEFT_OUT & {*inside.parts}
        if path.is_file() and not path.is_symlink() and not left_out:
            yield inside


def pack(project: Path, target: Path) -> None:
    """Write the archive while others may go on writing: what vanishes is left out, a torn last line is cut."""
    with tarfile.open(target, "w:gz", compresslevel=1) as archive:
        for inside in files_of(project):
            try:
                content = (project / inside).read_bytes()
            except FileNotFoundError:
                continue
            if inside.suffix in _APPENDED:
                content = content[: content.rfind(b"\n") + 1]
            entry = tarfile.TarInfo(inside.as_posix())
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(content))


def unpack(archive: Path, project: Path) -> None:
    """Put an archive's files into a project: plain files below it only."""
    with tarfile.open(archive) as opened:
        opened.extractall(project, filter="data")


def _unpacked(archive: Path, project: Path) -> bool:
    try:
        unpack(archive, project)
    except tarfile.TarError:  # a path that leads out of the project, a device, no archive at all
        return False
    return True


def save(folder: RunFolder, project: Path, attempt: int, stage: str) -> dict[str, Any]:
    """Upload an archive, then name it the latest; keep it and the one before. Return its entry."""
    before = folder.get_json(LATEST)
    number = 1 + (int(Path(before["key"]).name.partition("-")[0]) if before else 0)
    name = f"checkpoints/{number:04d}-{attempt}.tar.gz"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "archive"
        pack(project, file)
        folder.put_file(name, file)
        entry = {"key": name, "sha256": _sha256(file), "bytes": file.stat().st_size, "at": _now(),
                 "attempt": attempt, "stage": stage}  # fmt: skip
    old = before.pop("previous", None) if before else None
    folder.put_json(LATEST, {**entry, "previous": before})
    if old:
        folder.remove(old["key"])
    return entry


def restore(folder: RunFolder, project: Path) -> list[str]:
    """Bring the newest whole archive into the project; return what to tell. None there: nothing to tell.

    Raises:
        UserError: there are archives, and none of them is whole.
    """
    latest = folder.get_json(LATEST)
    if latest is None:
        return []
    told: list[str] = []
    for entry in filter(None, (latest, latest.get("previous"))):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "archive"
            if not folder.get_file(entry["key"], file):
                told.append(f"{entry['key']} is missing: falling back to the one before")
            elif _sha256(file) != entry["sha256"]:
                told.append(f"{entry['key']} is damaged (SHA-256 differs): falling back to the one before")
            elif not _unpacked(file, project):
                told.append(f"{entry['key']} holds what is no work of a run: falling back to the one before")
            else:
                where = f"{entry['bytes']:,} bytes of {entry['at']}, attempt {entry['attempt']}"
                return [*told, f"going on from {entry['key']} ({where}, stage {entry['stage'] or 'none yet'})"]
    raise UserError("; ".join(told).replace(": falling back to the one before", "")
                    + f": remove {LATEST} of the run to begin anew")  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
