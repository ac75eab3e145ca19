"""The whole way: `host run` launches on moto's server, the instance's own user data boots, results come from S3.

Stand-ins are EC2's machine (a folder), `make setup` (the environment here is linked), `shutdown` and what
test_rehearsal.py names besides.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from imds import Imds
from moto_server import serving
from played_host import RUN
from project import ROOT
from renting import leave_nothing
from seaweed import KEY, REGION, SECRET, Seaweed
from test_rehearsal import Host

from cnn_tuning.cloud import follow, inventory
from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.teardown import all_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PIPELINE = """
stages:
  train:
    cmd: mkdir -p models && cat params.yaml >models/baseline
    deps: [params.yaml]
    outs: [models/baseline]
"""


@pytest.fixture
def store(tmp_path):
    running = Seaweed(tmp_path / "store").start()
    yield running
    running.kill()


@pytest.fixture
def aws(store, prices, monkeypatch):
    """EC2 and the rest on moto's server, S3 on SeaweedFS: as processes of their own see them."""
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    with serving() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        made = Aws(REGION)
        yield made
        leave_nothing(made)


class Ec2:
    """What EC2 does with an instance: it runs its user data, and is gone when that has shut down."""

    def __init__(self, aws: Aws, folder: Path, store: Seaweed, metadata: str) -> None:
        self.aws, self.host = aws, Host(folder, store, metadata)
        self.host.environment["PYTHONPATH"] = str(ROOT / "src")
        self.booted: subprocess.Popen | None = None

    def passes(self) -> None:
        """Boot once, then let time pass."""
        ec2 = self.aws.client("ec2")
        [item] = inventory.instances(self.aws, "cnn-tuning", RUN)
        if self.booted is None:
            kept = ec2.describe_instance_attribute(InstanceId=item["InstanceId"], Attribute="userData")
            script = base64.b64decode(kept["UserData"]["Value"]).decode()
            there = script.replace("ROOT=/opt/cnn-tuning\n", f"ROOT={self.host.root}\n", 1)
            assert there != script
            file = self.host.folder / "user-data"
            file.write_text(there)
            bash = shutil.which("bash")
            assert bash
            self.booted = subprocess.Popen(
                [bash, str(file)], env=self.host.environment, cwd="/", start_new_session=True
            )
        elif self.booted.poll() is not None:
            ec2.terminate_instances(InstanceIds=[item["InstanceId"]])
        time.sleep(0.5)


def test_one_command_goes_there_and_comes_back(aws, project, images, command, store, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (project / ".gitignore").write_text("/models/\n/.state/\n/.venv\n/mlruns/\n/mlflow.db*\n")
    (project / ".dvc/.gitignore").write_text("/cache\n/tmp\n/config.local\n")
    (project / "dvc.yaml").write_text(PIPELINE)
    service = Imds()
    ec2 = Ec2(aws, tmp_path / "machine", store, service.url)
    monkeypatch.setattr(follow, "pause", ec2.passes)
    try:
        done = command("host", "run", "--yes", "--run", RUN)
    finally:
        service.stop()
        if ec2.booted is not None and ec2.booted.poll() is None:
            ec2.booted.kill()
    log = (ec2.host.root / "boot.log").read_text()
    assert done.exit_code == 0, done.output + log
    assert "models and metrics: 1 files fetched, models/baseline" in done.output
    # The params.yaml of here went there as code and came back as a model.
    assert (project / "models/baseline").read_text() == (project / "params.yaml").read_text()
    assert (project / "dvc.lock").read_bytes() == (ec2.host.root / "project/dvc.lock").read_bytes()
    assert (ec2.host.folder / "calls").read_text().splitlines()[-1] == "shutdown -h now"
    assert f"run {RUN}: nothing of it is left on EC2" in done.output
    assert all_runs(aws, "cnn-tuning") == []
    for secret in (SECRET, KEY):
        assert secret not in done.output + log
