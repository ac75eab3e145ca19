"""The rehearsal: hosts really boot, train, are taken away and replaced, against a real S3 server.

What is a stand-in: EC2 itself (a folder is a host), the metadata service, `make setup` (the environment here is
linked), `shutdown` and the package managers (they note that they were called), and `aws` where there is none.
All of it runs in a network namespace of its own, where there is no way out and the metadata service has its real
address. A kernel that allows none: on loopback, with AWS_EC2_METADATA_SERVICE_ENDPOINT.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from children import below

sys.path.insert(0, str(Path(__file__).parents[1]))
from imds import Imds
from project import BIN, ROOT, Project
from renting import host_config, order
from seaweed import BUCKET, REGION, Seaweed

from cnn_tuning.cloud import code
from cnn_tuning.cloud.specification import boot_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METADATA = "169.254.169.254"
NAMESPACE = (
    "unshare",
    "-rn",
    "sh",
    "-c",
    f'ip link set lo up && ip addr add {METADATA}/32 dev lo && exec "$@"',
    "-",
)
PARAMS = """
experiment: digits
seed: 0
ablation: none
search: none
trainer: {max_epochs: 16, checkpoint_every_s: 0.5}
"""
# What differs from one run to the next: times, rates, and reports that show them.
TIMED = ("results/training", "results/evaluation", "results/diagnosis")


class Host:
    """A folder that stands for a host's disk; its commands note how they were called."""

    def __init__(self, folder: Path, store: Seaweed, metadata: str | None) -> None:
        self.folder, self.root, self.bin = folder, folder / "root", folder / "bin"
        self.bin.mkdir(parents=True)
        for tool in ("shutdown", "apt-get", "snap"):
            self.command(tool, f'echo "{tool} $*" >>{folder}/calls')
        self.command("make", f'echo "make $*" >>{folder}/calls; ln -s {ROOT}/.venv .venv')
        self.command("aws", _aws())
        # Credentials come from the metadata service, as on a host.
        self.environment = {
            "PATH": f"{self.bin}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(folder),
            "PYTHONPATH": str(self.root / "project/src"),
            "AWS_ENDPOINT_URL": store.url,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DVC_NO_ANALYTICS": "1",
            "AGENT_RUN_SAVE_EVERY": "10",  # pushes beside the running pipeline, which holds DVC's lock at times
            **({"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata} if metadata else {}),
        }

    def command(self, name: str, does: str) -> None:
        """Make a command of this host."""
        (self.bin / name).write_text(f"#!/bin/bash\n{does}\n")
        (self.bin / name).chmod(0o755)

    def boot(self, run: str, attempt: int, commit: str) -> subprocess.Popen:
        """Boot."""
        script = boot_script(
            host_config(bucket=BUCKET, region=REGION),
            replace(order(run), commit=commit, attempt=attempt),
            60,
            root=str(self.root),
            price_per_hour=0.5,
        )
        (self.folder / "user-data").write_text(script)
        bash = shutil.which("bash")
        assert bash
        return subprocess.Popen(
            [bash, str(self.folder / "user-data")], env=self.environment, cwd="/", start_new_session=True
        )


def _aws() -> str:
    """Return what `aws` does on a host: the one that is installed, else as much of it as the boot script uses."""
    found = shutil.which("aws")
    if found and not subprocess.run([found, "--version"], capture_output=True).returncode:
        return f'HOME={Path.home()} exec {found} "$@"'
    return f'exec {BIN}/python {Path(__file__).parents[1]}/aws_s3_cp.py "$@"'


def rehearse(folder: Path) -> None:
    """Act it all out; what is left of it stands below the folder."""
    try:
        _rehearse(folder)
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _rehearse(folder: Path) -> None:
    store = Seaweed(folder / "store").start()
    alone = METADATA in subprocess.run(["ip", "addr"], capture_output=True, text=True).stdout
    first = Imds((METADATA, 80)) if alone else Imds()
    second = Imds()
    address = None if alone else first.url
    laptop = Project(folder / "laptop", PARAMS)
    whole = _send(laptop, store, "run-whole")
    cut = _send(laptop, store, "run-cut")
    began = time.time()
    hosts = {name: Host(folder / name, store, address) for name in ("cut-0", "cut-1")}
    hosts["whole"] = Host(folder / "whole", store, second.url)
    uninterrupted = hosts["whole"].boot("run-whole", 0, whole)
    interrupted = hosts["cut-0"].boot("run-cut", 0, cut)
    _wait_for(lambda: list(hosts["cut-0"].root.glob("project/.state/train/*/checkpoints.json")), interrupted)
    # However fast it trains, the notice comes in the middle of it.
    training = _training_of(interrupted)
    training.suspend()
    first.notice()
    noticed = time.time()
    _wait_for(lambda: first.told_at, interrupted)
    training.resume()
    times: dict[str, Any] = {"until_notice": noticed - began, "statuses": [interrupted.wait(timeout=200)]}
    times["until_shutdown"] = time.time() - noticed
    _keep(store, folder, "after-0")
    first.notice_at = None
    times["statuses"] += [
        hosts["cut-1"].boot("run-cut", 1, cut).wait(timeout=250),
        uninterrupted.wait(timeout=250),
    ]
    _keep(store, folder, "after-1")
    times["in_namespace"] = alone
    times["whole"] = time.time() - began
    (folder / "times.json").write_text(json.dumps(times))


def _send(laptop: Project, store: Seaweed, run: str) -> str:
    """Commit with a remote of the run's own, and upload the code; return the commit."""
    url = f"s3://{BUCKET}/cnn-tuning/dvc-{run}"
    laptop.run("dvc", "remote", "add", "--force", "--default", "storage", url)
    laptop.run("dvc", "remote", "modify", "storage", "verify", "true")
    laptop.commit(run)
    commit = laptop.run("git", "rev-parse", "HEAD").strip()
    code.upload(store.client(), laptop.path, commit, run, BUCKET, "cnn-tuning")
    return commit


def _training_of(host: subprocess.Popen) -> psutil.Process:
    """Return the process that trains on a host."""
    [found] = [
        process for process, command in below(host.pid) if command[1:3] == ["-m", "cnn_tuning.stages.train"]
    ]
    return found


def _wait_for(seen: Callable[[], object], process: subprocess.Popen) -> None:
    until = time.monotonic() + 150
    while not seen():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < until
        time.sleep(0.02)


def _keep(store: Seaweed, folder: Path, name: str) -> None:
    """Download what is in the bucket, but the outputs that DVC keeps there."""
    for key in store.keys("cnn-tuning/runs/"):
        target = folder / name / key.removeprefix("cnn-tuning/runs/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(key))
    pages = (
        store.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="cnn-tuning/dvc-run-cut/")
    )
    there = {item["Key"]: str(item["LastModified"]) for page in pages for item in page.get("Contents", ())}
    (folder / name / "remote.json").write_text(json.dumps(there))


class Acted:
    """What a rehearsal has left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times = json.loads((folder / "times.json").read_text())

    def json(self, name: str) -> Any:
        """Return a JSON file below the folder."""
        return json.loads((self.folder / name).read_text())

    def log(self, host: str) -> str:
        """Return a host's log."""
        return (self.folder / host / "root/boot.log").read_text()

    def project(self, host: str) -> Path:
        """Return the project on a host's disk."""
        return self.folder / host / "root/project"

    def outs(self, host: str) -> dict[str, str]:
        """Return path and hash of what DVC tracks there."""
        stages = yaml.safe_load((self.project(host) / "dvc.lock").read_text())["stages"].values()
        return {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", ())}


@pytest.fixture(scope="module")
def acted(tmp_path_factory: pytest.TempPathFactory) -> Acted:
    folder = tmp_path_factory.mktemp("rehearsal")
    apart = not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "DVC_"))}
    with (folder / "printed").open("w") as printed:
        done = subprocess.run(
            [*(NAMESPACE if apart else ()), sys.executable, __file__, str(folder)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**kept, "PYTHONPATH": str(ROOT / "tests")},
        )
    assert not done.returncode, (folder / "printed").read_text()
    return Acted(folder)


def ran(log: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", log)


def test_it_had_no_network_but_its_own(acted):
    if shutil.which("unshare"):
        assert acted.times["in_namespace"] or subprocess.run([*NAMESPACE, "true"]).returncode


def test_the_first_host_saved_and_said_so_within_two_minutes(acted):
    assert "spot notice: EC2 takes this host away at" in acted.log("cut-0")
    assert acted.times["statuses"][0] == 75
    assert acted.times["until_shutdown"] < 120
    state = acted.json("after-0/run-cut/state.json")
    assert (state["state"], state["exit"], state["stage"], state["attempt"]) == ("interrupted", 75, "train", 0)
    assert (state["instance"], state["type"]) == ("i-0123456789abcdef0", "g5.xlarge")
    assert (acted.folder / "cut-0/calls").read_text().splitlines()[-1] == "shutdown -h now"
    assert "interrupted:" in (acted.folder / "after-0/run-cut/boot.log").read_text()
    latest = acted.json("after-0/run-cut/checkpoints/latest.json")
    with tarfile.open(acted.folder / "after-0/run-cut" / latest["key"]) as archive:
        names = archive.getnames()
    assert any(name.endswith(".ckpt") for name in names)
    assert not [name for name in names if not name.startswith((".state/", "dvc.lock", "params.lock.yaml"))]


def test_the_second_host_went_on_in_the_middle_and_trained_nothing_twice(acted):
    assert acted.times["statuses"][1] == 0
    assert set(ran(acted.log("cut-0"))) == {"configure", "fetch", "fetch_weights", "preprocess", "train"}
    assert not set(ran(acted.log("cut-1"))) & {"fetch", "fetch_weights", "preprocess"}
    assert ran(acted.log("cut-1"))[0] == "train"
    step = json.loads((acted.project("cut-1") / "results/training/training.json").read_text())["resumed_from_step"]
    assert step > 0
    assert f"at step {step}" in acted.log("cut-1")
    state = acted.json("after-1/run-cut/state.json")
    assert (state["state"], state["attempt"]) == ("finished", 1)


def test_what_was_pushed_is_not_pushed_again(acted):
    before, after = acted.json("after-0/remote.json"), acted.json("after-1/remote.json")
    assert {acted.outs("cut-1")[path] for path in ("data/raw", "data/prepared")} <= {
        "".join(key.split("/")[-2:]) for key in before
    }
    assert before.items() < after.items()


def test_the_end_is_that_of_a_run_which_was_not_interrupted(acted):
    assert acted.times["statuses"][2] == 0
    assert acted.json("after-1/run-whole/state.json")["state"] == "finished"
    whole, cut = acted.outs("whole"), acted.outs("cut-1")
    assert set(whole) == set(cut)
    assert {path for path in whole if whole[path] != cut[path]} <= set(TIMED)
    for name in ("models/baseline/history.csv", "results/evaluation/metrics.json"):
        assert (acted.project("whole") / name).read_bytes() == (acted.project("cut-1") / name).read_bytes()


@pytest.fixture(scope="module")
def runs(acted: Acted) -> list[tuple[str, str]]:
    """Return kind and status of the runs that the laptop's store has after the replay of what came back."""
    from cnn_tuning.tracking.deliver import sync

    store = acted.folder / "laptop.db"
    synced = sync(acted.folder / "after-1/run-cut/spool", f"sqlite:///{store}")
    assert {run.state for run in synced} == {"delivered"}
    with sqlite3.connect(store) as opened:
        return opened.execute(
            "select value, status from tags join runs using (run_uuid) where key = 'cnn_tuning.kind' order by 1"
        ).fetchall()


def test_the_runs_come_back_and_none_is_left_open(runs):
    assert {kind for kind, _ in runs} == {"preprocess", "train", "evaluate"}
    assert ("train", "FINISHED") in runs
    assert "RUNNING" not in {status for _, status in runs}


def test_the_training_is_one_run(runs):
    assert [status for kind, status in runs if kind == "train"] == ["FINISHED"]


def test_no_secret_is_in_what_was_uploaded(acted):
    from seaweed import SECRET

    for name in ("after-0", "after-1"):
        for path in (acted.folder / name).rglob("*"):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path


if __name__ == "__main__":
    rehearse(Path(sys.argv[1]))
