"""Trainings in one process, again and again: memory, threads and file descriptors have to stay as they are.

    python bench/soak.py --minutes 120 [--epochs 2]

Each is a whole `fit` of the digits with a tracked run, as an ablation makes them. After the first few (caches
fill) each leaves a row; goes out: the medians of the first and the last third. Exit status 1 where memory grew by
more than 3 % and 20 MB, or threads or descriptors grew at all.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from workplace import ROOT, machine, prepared

WARM = 5
SAY_EVERY_S = 60


def main() -> int:
    """Train until the time is up and compare the thirds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        rows = trainings(Path(folder), options.minutes * 60, options.epochs)
    size = max(1, len(rows) // 3)
    first, last = medians(rows[:size]), medians(rows[-size:])
    for name, before, after in zip(("memory, MB", "threads", "descriptors"), first, last, strict=True):
        print(f"{name}: {before:,.0f} in the first third, {after:,.0f} in the last")
    grown = last[0] > first[0] * 1.03 and last[0] > first[0] + 20
    held = not grown and last[1] <= first[1] and last[2] <= first[2]
    print(f"{len(rows) + WARM} trainings: {'held' if held else 'GREW'}")
    return int(not held)


def medians(rows: list[tuple[float, int, int]]) -> list[float]:
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def trainings(folder: Path, seconds: float, epochs: int) -> list[tuple[float, int, int]]:
    """Train again and again; return memory (MB), threads and descriptors after each but the first few."""
    from cnn_tuning.config import Recipe, TrackingConfig, compose, patch, select
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.tracking.run import Run
    from cnn_tuning.training.fit import fit

    recipe = select(Recipe, compose(["experiment=digits"], params=None, conf=ROOT / "conf"))
    data = PackedData.open(prepared("digits") / "data/prepared")
    config = TrackingConfig(
        name="soak", experiment="soak", uri=f"sqlite:///{folder}/mlflow.db", spool=f"{folder}/spool"
    )
    process, rows, began, said = psutil.Process(), [], time.monotonic(), 0.0
    number = 0
    while time.monotonic() - began < seconds or number <= WARM + 3:
        changed = patch(recipe, {"trainer.max_epochs": epochs, "seed": number})
        with Run.start(config, name=f"soak {number}", kind="train", params={"seed": number}, waits=False) as run:
            fitted = fit(changed, data, state_folder=folder / "state", log=run.log_metrics, brief=True)
            fitted.state.remove()
        del fitted
        gc.collect()
        number += 1
        row = process.memory_info().rss / 1e6, process.num_threads(), process.num_fds()
        if number > WARM:
            rows.append(row)
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            left = (seconds - (said - began)) / 60
            print(
                f"training {number}: {row[0]:,.0f} MB, {row[1]} threads, {row[2]} descriptors; {left:.0f} min left"
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
