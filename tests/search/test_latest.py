"""Which storage `make dashboard` opens."""

from __future__ import annotations

import os
import subprocess
import sys


def told(folder):
    command = [sys.executable, "-m", "cnn_tuning.search.latest"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout or done.stderr).strip()


def test_the_journal_written_last_or_the_database_of_the_experiment(tmp_path):
    assert told(tmp_path) == (
        1, "no search has run here yet: `dvc repro` runs that of the experiment (search:)",
    )  # fmt: skip
    journals = [".state/search/journal.log", "scratch/lab/.state/search/journal.log"]
    for age, name in enumerate(journals):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    lock = tmp_path / "params.lock.yaml"
    lock.write_text("search: {storage: journal}\n")
    assert told(tmp_path) == (0, journals[0])
    os.utime(tmp_path / journals[1], (2000, 2000))
    assert told(tmp_path) == (0, journals[1])
    # None of the journals that lie here is this experiment's.
    lock.write_text("search: {storage: postgresql://lab@db/searches}\n")
    assert told(tmp_path) == (0, "postgresql+psycopg://lab@db/searches")
