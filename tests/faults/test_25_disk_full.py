"""Row 25: the disk is full; "no space left" with the path, earlier results are intact, with room it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from striking import SAVING, by_hand  # noqa: F401

pytestmark = pytest.mark.slow


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Put a folder on a file system of 16 MB, with what it holds."""
    kept = folder.with_name(f"{folder.name}.kept")
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, kept)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        assert not os.environ.get("CI"), mounted.stderr
        pytest.skip("mounting a small disk needs root")
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Fill it to the last byte and return the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        while file.write(b"\0" * 4096):
            pass
    return filler


@pytest.mark.parametrize("folder", [".state", "models", "results"])
def test_25_a_training_goes_on_once_there_is_room(by_hand, folder):  # noqa: F811
    others = [by_hand.path / name for name in ("models/tuned/model.json", "results/search/metrics.json")]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_text(f"{path.name} of an earlier stage")
    with small_disk(by_hand.path / folder) as disk:
        earlier = {path: path.read_bytes() for path in others}
        process = by_hand.stage("train", *SAVING, at="train 5")
        by_hand.reached(process)
        before = {path.name: path.read_bytes() for path in by_hand.checkpoints()}
        assert before
        filler = fill(disk)
        by_hand.go_on()
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == 1, printed
        assert "Traceback" not in printed
        told = [line for line in printed.splitlines() if "No space left on device" in line]
        assert told
        assert all(folder in line for line in told)
        if folder == ".state":
            kept = {path.name: path.read_bytes() for path in by_hand.checkpoints()}
            assert kept == before
        assert not (by_hand.path / "models/baseline/model.json").exists() or folder == "results"
        assert {path: path.read_bytes() for path in others} == earlier
        by_hand.until_nobody_is_left()
        filler.unlink()
        process = by_hand.stage("train", *SAVING)
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == 0, printed
        assert "going on from" in printed
        assert by_hand.ends()[-1] == "FINISHED"
        assert {path: path.read_bytes() for path in others} == earlier


def test_25_prepared_data_stay_as_they_were(by_hand):  # noqa: F811
    with small_disk(by_hand.path / "data") as disk:
        before = contents(disk / "prepared")
        assert before
        fill(disk)
        process = by_hand.stage("preprocess", "seed=1")
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == 1, printed
        assert "Traceback" not in printed
        assert "No space left on device; data/prepared is as it was" in printed
        assert contents(disk / "prepared") == before
        assert not (disk / ".prepared.new").exists()


def contents(folder: Path) -> dict[str, bytes]:
    with suppress(FileNotFoundError):
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {}
