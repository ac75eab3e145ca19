"""Print the storage of the searches here, as optuna-dashboard takes it: `python -m cnn_tuning.search.latest`.

It is the database that params.lock.yaml names, or else the journal that was written last.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from cnn_tuning.search.storage import JOURNAL, with_driver

FOLDERS = (".state/search", "scratch/.state/search", "scratch/*/.state/search")


def latest(project: Path) -> str | None:
    """Return the address of a database or the path of a journal; None where no search has run."""
    lock = project / "params.lock.yaml"
    composed = yaml.safe_load(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    uri = composed.get("search", {}).get("storage", "journal")
    if uri != "journal":
        return with_driver(uri)
    journals = [path for folder in FOLDERS for path in project.glob(f"{folder}/**/{JOURNAL}")]
    return str(max(journals, key=lambda path: path.stat().st_mtime)) if journals else None


if __name__ == "__main__":
    found = latest(Path())
    if found is None:
        sys.exit("no search has run here yet: `dvc repro` runs that of the experiment (search:)")
    print(found)
