"""What DVC knows of a path: its hash in `dvc.lock`."""

from __future__ import annotations

from pathlib import Path


def data_hash(path: Path, lock: Path = Path("dvc.lock")) -> str:
    """Return the MD5 that `dvc.lock` holds for an output, as DVC writes it (a folder's ends in `.dir`).

    Raises:
        KeyError: no stage in the lock file has that output.
    """
    import yaml

    stages = yaml.safe_load(lock.read_text())["stages"].values()
    hashes = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
    return hashes[path.as_posix()]
