"""Both sides of a run keep to one contract: what the host's own code writes is what the laptop goes by."""

from __future__ import annotations

import json
import re
import time

import pytest
from played_host import BUCKET, LOCK, RUN, spooled
from renting import REGION, host_config

from cnn_tuning.cloud.attempt import Attempt
from cnn_tuning.cloud.metadata import Metadata
from cnn_tuning.cloud.runfolder import RunFolder
from cnn_tuning.cloud.supervise import Ended
from cnn_tuning.cloud.teardown import all_runs

START = ("host", "run", "--yes", "--run", RUN)


@pytest.fixture
def working(aws, played, tmp_path):
    """Return a function that makes the host's side of the attempt that runs now, in a folder of its own."""

    def make() -> Attempt:
        folder = tmp_path / f"there-{played.attempt}"
        (folder / ".state/spool").mkdir(parents=True, exist_ok=True)
        (folder / "dvc.lock").write_text(LOCK)
        (folder / "params.lock.yaml").write_text("experiment: mnist\n")
        end = {"event": "finish", "status": "FINISHED", "error": ""}
        (folder / ".state/spool/one.jsonl").write_bytes(spooled("one", [end]))
        place = RunFolder(aws.client("s3"), BUCKET, f"cnn-tuning/runs/{RUN}")
        nobody = Metadata("http://127.0.0.1:9")
        made = Attempt(
            folder=place,
            region=REGION,
            attempt=played.attempt,
            told=folder / "told.json",
            began=time.time(),
            metadata=nobody,
            project=folder,
        )
        made.push = lambda timeout=None: None  # DVC's part is in test_round_trip
        return made

    return make


def test_the_laptop_understands_what_a_host_writes(
    aws, project, command, played, working, store_db, rows, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_db}")

    def report():
        made = working()
        made.output.follow(iter(["Running stage 'train':\n", "epoch 1 of 8\n"]))
        assert made.report() is False

    def finish():
        made = working()
        made.results()
        made.tell("finished", 0)

    played.plays(report, lambda: working().conclude(Ended("notice", -15)), report, finish)
    done = command(*START)
    assert done.exit_code == 0, done.output
    assert "train: epoch 1 of 8" in done.output
    assert "was interrupted, its work is saved" in done.output and "on 2 hosts" in done.output
    assert (project / "dvc.lock").read_text() == LOCK
    assert rows(store_db, "select status from runs") == [("FINISHED",)]
    assert all_runs(aws, "cnn-tuning") == []


def test_a_host_hears_that_the_budget_is_reached(aws, project, command, played, working):
    heard = []
    played.plays(
        lambda: heard.append(working().report()),
        played.waits(minutes=28),
        lambda: heard.append(json.loads(played.get("stop.json"))["why"]),
        lambda: heard.append(working().report()),
        lambda: working().conclude(Ended("asked", -15)),
    )
    done = command(*START, "--on-demand", "--budget", "0.5")
    assert done.exit_code == 1
    assert heard == [False, "budget", True]
    assert "its work is saved" in done.output
    assert all_runs(aws, "cnn-tuning") == []


def test_the_plan_refuses_the_gpus_that_the_locked_torch_of_a_host_does_not_serve():
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or ""
    served = [int(number) / 10 for number in re.findall(r"\bsm_(\d+)", flags)]
    if not served:
        pytest.skip("this torch is not built for CUDA")
    assert host_config().oldest_compute_capability == min(served)
