"""See that all trainings of an ablation are made, by several processes, and return their results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cnn_tuning.ablation.outcome import Result
from cnn_tuning.ablation.train import Job, missing, results_of, train_jobs
from cnn_tuning.ablation.worker import share
from cnn_tuning.config import DiagnosisConfig, TrackingConfig, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.tracking.run import Run

LOOK_S = 1.0


def settle(
    jobs: Sequence[Job],
    data: PackedData,
    kept: Path,
    *,
    workers: int,
    diagnosis: DiagnosisConfig,
    tracking: TrackingConfig,
    tracked: Run,
) -> list[Result]:
    """Train the jobs that are missing below `kept`, `workers` side by side, within the run `tracked`.

    Raises:
        Interrupted: a signal came; what was done is kept.
    """
    kept.mkdir(parents=True, exist_ok=True)
    # Trainings side by side share what the machine costs.
    tracking = replace(tracking, price_per_hour=tracking.price_per_hour / workers)
    remaining = missing(jobs, data, kept)
    spec = {
        "jobs": [asdict(job) for job in jobs],
        "data": str(data.path),
        "folder": str(kept),
        "diagnosis": to_plain(diagnosis),
        "tracking": to_plain(tracking),
        "parent": tracked.key,
    }
    while left := missing(jobs, data, kept):  # again, where a worker died
        with share(min(workers, remaining) - 1, kept / f"{jobs[0].question}.json", **spec):
            train_jobs(jobs, data, kept, diagnosis=diagnosis, tracking=tracking, parent=tracked.key)
        if missing(jobs, data, kept) == left:
            time.sleep(LOOK_S)  # another ablation is at the rest
    tracked.log_metrics({"arms/computed": remaining, "arms/known": len(jobs) - remaining})
    return results_of(jobs, data, kept, tracking.price_per_hour, diagnosis)
