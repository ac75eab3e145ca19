"""One of several processes that train arms side by side: `python -m cnn_tuning.ablation.worker SPEC.json`.

SPEC.json: what `share` wrote. A worker ends when nothing is left that no other process is at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cnn_tuning.config import DiagnosisConfig, Recipe, TrackingConfig, validate
from cnn_tuning.machine import end_with, prepare_process


@contextmanager
def share(workers: int, spec: Path, **content: object) -> Iterator[None]:
    """Run `workers` further processes until the block ends; none outlives it."""
    spec.write_text(json.dumps(content))
    command = [sys.executable, "-P", "-m", "cnn_tuning.ablation.worker", str(spec)]
    # Own process groups: this process passes a Ctrl-C on, once.
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(workers)]
    try:
        yield
        for process in processes:
            process.wait()
    finally:
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def main(spec: Path) -> None:
    """Train what is missing."""
    from cnn_tuning.ablation.train import Job, train_jobs
    from cnn_tuning.data.packed import PackedData

    content = json.loads(spec.read_text())
    jobs = [Job(j["question"], j["arm"], validate(Recipe, j["recipe"]), j["place"]) for j in content["jobs"]]
    data = PackedData.open(Path(content["data"]))
    tracking = validate(TrackingConfig, content["tracking"])
    diagnosis = validate(DiagnosisConfig, content["diagnosis"])
    folder, parent = Path(content["folder"]), content["parent"]
    train_jobs(jobs, data, folder, diagnosis=diagnosis, tracking=tracking, parent=parent)


if __name__ == "__main__":
    prepare_process()
    end_with(os.getppid())
    main(Path(sys.argv[1]))
