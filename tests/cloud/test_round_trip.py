"""A run's way to a host and back over a real S3 interface: DVC pushes and pulls, Git brings the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moto_server import serving
from played_host import BUCKET, RUN
from renting import REGION, leave_nothing

from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.names import as_mapping
from cnn_tuning.cloud.teardown import all_runs

pytestmark = pytest.mark.slow

PIPELINE = """
stages:
  prepare:
    cmd: mkdir -p data && python -c "open('data/raw', 'w').write('pictures')"
    outs: [data/raw]
  train:
    cmd: mkdir -p models && cp data/raw models/baseline && cat params.yaml >>models/baseline
    deps: [data/raw, params.yaml]
    outs: [models/baseline]
"""


@pytest.fixture
def aws(credentials, prices, monkeypatch):
    """An account on a server, which processes of their own see, too."""
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    with serving() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        made = Aws(REGION)
        yield made
        leave_nothing(made)


def dvc(folder, *arguments):
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_goes_out_and_models_come_back(aws, project, command, played, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (project / ".gitignore").write_text("/data/\n/models/\n/.state/\n/mlruns/\n/mlflow.db*\n")
    (project / ".dvc/.gitignore").write_text("/cache\n/tmp\n/config.local\n")
    (project / "dvc.yaml").write_text(PIPELINE)
    dvc(project, "repro", "-q", "prepare")
    there = tmp_path / "there"

    def work():
        """Do what a host does, elsewhere, with nothing but the bucket."""
        (tmp_path / "code.bundle").write_bytes(played.get("code.bundle"))
        git = ["git", "-c", "init.defaultBranch=main"]
        subprocess.run([*git, "init", "-q", str(there)], check=True)
        subprocess.run([*git, "fetch", "-q", "../code.bundle", "+refs/*:refs/remotes/b/*"], cwd=there, check=True)
        commit = as_mapping(played.instance["Tags"])["commit"]
        subprocess.run([*git, "checkout", "-q", commit], cwd=there, check=True)
        dvc(there, "pull", "--allow-missing")
        assert (there / "data/raw").read_text() == "pictures"
        dvc(there, "repro")
        dvc(there, "push")
        played.put("dvc.lock", (there / "dvc.lock").read_bytes())
        played.tells("finished")()

    played.plays(played.tells("started"), work)
    done = command("host", "run", "--yes", "--run", RUN)
    assert done.exit_code == 0, done.output
    assert "data: 1 outputs, 0.0 MB, to s3://a-bucket/cnn-tuning/dvc" in done.output
    assert "data: 1 files pushed" in done.output
    assert (project / "dvc.lock").read_bytes() == (there / "dvc.lock").read_bytes()
    assert (project / "models/baseline").read_bytes() == (there / "models/baseline").read_bytes()
    assert all_runs(aws, "cnn-tuning") == []

    # Where something else is asked for here by now, they come beside what is here.
    asked = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(asked.replace("limit: 60000", "limit: 50000"))
    made = (project / "models/baseline").read_bytes()
    subprocess.run(["rm", "-rf", ".dvc/cache", "models"], cwd=project, check=True)
    (project / "dvc.lock").write_text("mine: 1\n")
    apart = command("host", "pull", RUN)
    assert apart.exit_code == 0, apart.output
    assert f"1 files fetched, models/baseline, in .state/hosts/{RUN}/outs" in apart.output
    assert (project / ".state/hosts" / RUN / "outs/models/baseline").read_bytes() == made
    assert (project / "dvc.lock").read_text() == "mine: 1\n" and not (project / "models").exists()
    (project / "params.yaml").write_text(asked)
    (project / "dvc.lock").write_bytes((there / "dvc.lock").read_bytes())

    # What DVC refuses is one line, and the rest of the results are here all the same.
    keys = [item["Key"] for item in aws.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]]
    for key in keys:
        if "/dvc/" in key:
            aws.client("s3").delete_object(Bucket=BUCKET, Key=key)
    subprocess.run(["rm", "-rf", ".dvc/cache", "models"], cwd=project, check=True)
    again = command("host", "pull", RUN)
    assert again.exit_code == 1
    assert again.output.splitlines()[-1].startswith("error: dvc pull: ")
