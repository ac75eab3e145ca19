"""`host run`: what is asked before a host starts, the code that it gets, and what it may cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from played_host import LOCK, ends_well, spooled
from renting import ROOT, WHO, intercept

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.code import bundle, snapshot
from cnn_tuning.cloud.names import as_mapping
from cnn_tuning.cloud.teardown import all_runs
from cnn_tuning.config import compose, flatten, to_plain
from cnn_tuning.errors import UserError
from cnn_tuning.tracking import facts


def git(folder, *arguments):
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "kept").write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, *WHO, "commit", "-qm", "start")
    return folder


def checked_out(folder, commit, tmp_path):
    """Return the folder that the boot script would make of a bundle."""
    file, there = tmp_path / "code.bundle", tmp_path / "there"
    bundle(folder, commit, "run-one", file)
    git(tmp_path, "init", "-q", str(there))
    git(there, "fetch", "-q", str(file), "+refs/*:refs/remotes/bundle/*")
    git(there, "checkout", "-q", commit)
    return there


def test_uncommitted_and_new_files_go_along_and_nothing_changes_here(repository, tmp_path):
    (repository / "kept").write_text("2")
    (repository / "sub/new").write_text("new")
    (repository / "ignored").write_text("no")
    before = git(repository, "status", "--porcelain"), git(repository, "for-each-ref")
    taken = snapshot(repository / "sub")
    there = checked_out(repository, taken.commit, tmp_path)
    assert taken.changed
    assert ((there / "kept").read_text(), (there / "sub/new").read_text()) == ("2", "new")
    assert not (there / "ignored").exists()
    assert (git(repository, "status", "--porcelain"), git(repository, "for-each-ref")) == before


@pytest.mark.parametrize("exported", [(), ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")], ids=["none", "exported"])
def test_a_host_knows_of_which_commit_its_snapshot_was_made(repository, tmp_path, monkeypatch, exported):
    for name in exported:
        monkeypatch.setenv(name, "a.person@example.org")
    (repository / "kept").write_text("2")
    taken = snapshot(repository)
    monkeypatch.chdir(checked_out(repository, taken.commit, tmp_path))
    tags, head = facts.gather(), git(repository, "rev-parse", "HEAD")
    assert (tags["git.commit"], tags["git.dirty"]) == (taken.commit, "false")
    assert tags["git.snapshot_of"] == head
    assert facts.code_of(tags) == (head, True)
    assert facts.code_text(tags) == f"{head}, with uncommitted changes"
    (repository.parent / "there/kept").write_text("3")
    assert facts.code_text(facts.gather()) == f"{head}, with uncommitted changes, with changes in kept"


def test_the_commits_of_a_person_are_no_snapshots(repository, monkeypatch):
    git(repository, *WHO, "commit", "-q", "--allow-empty", "-m", "more")
    monkeypatch.chdir(repository)
    assert facts.code_of(facts.gather()) == (git(repository, "rev-parse", "HEAD"), False)


def test_a_clean_tree_is_its_own_commit(repository, tmp_path):
    taken = snapshot(repository)
    assert (taken.commit, taken.changed) == (git(repository, "rev-parse", "HEAD"), False)
    assert (checked_out(repository, taken.commit, tmp_path) / "kept").read_text() == "1"


def test_without_a_commit_there_is_one_line(tmp_path):
    git(tmp_path, "init", "-q")
    with pytest.raises(UserError, match="Git repository with a commit"):
        snapshot(tmp_path)


def test_a_shallow_clone_is_refused_with_what_to_do(repository, tmp_path):
    git(repository, *WHO, "commit", "-q", "--allow-empty", "-m", "more")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    with pytest.raises(UserError, match="git fetch --unshallow"):
        snapshot(tmp_path / "shallow")
    git(tmp_path / "shallow", "fetch", "-q", "--unshallow")
    assert snapshot(tmp_path / "shallow").commit


def test_a_host_to_work_on_is_not_refused_for_the_pipelines_length(aws, project, command):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    params = project / "params.yaml"
    params.write_text(params.read_text() + "trainer: {max_epochs: 1000000}\n")
    assert "no type can be taken" in command("host", "run", "--yes", "--run", "run-one").output
    done = command("host", "up", "--yes", "--run", "run-one")
    assert done.exit_code == 0, done.output


def test_a_host_to_work_on_is_offered_by_its_price_per_hour(aws, spot, project, command):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    done = command("host", "up", "--yes", "--run", "run-one", "host.candidates=[g5.xlarge,g4dn.xlarge]")
    assert done.exit_code == 0, done.output
    ranked = [line.split() for line in done.output.splitlines() if re.match(r"\w+\.xlarge .* ok", line)]
    assert [(row[0], *row[-3:-1]) for row in ranked] == [
        ("g4dn.xlarge", "0.526", "0.190"),
        ("g5.xlarge", "1.006", "0.400"),
    ]
    assert re.search(r"g5\.xlarge +0\.400 +0\.450 *\n", done.output)


def test_a_run_starts_one_host_with_the_code_and_an_end_within_the_budget(aws, project, command):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    (project / "more").write_text("x")
    done = command("host", "run", "--yes", "--detach", "--run", "run-one", "--budget", "0.51")
    assert done.exit_code == 0, done.output
    assert "with uncommitted changes" in done.output
    assert "refused: p3.2xlarge" in done.output
    assert "after 0.50 h at the latest" in done.output  # 0.51 / (1.006 + disk and address), whole minutes
    [item] = inventory.instances(aws, "cnn-tuning")
    tags = as_mapping(item["Tags"])
    body = aws.client("s3").get_object(Bucket="a-bucket", Key="cnn-tuning/runs/run-one/code.bundle")["Body"].read()
    (project / "b").write_bytes(body)
    assert tags["commit"] in git(project, "bundle", "list-heads", "b")
    (project / "b").unlink()
    again = command("host", "run", "--detach", "--run", "run-one")
    assert f"host {item['InstanceId']} runs" in again.output
    assert len(inventory.instances(aws, "cnn-tuning")) == 1


def test_speeds_that_were_measured_count_in_the_plan_of_a_run(
    aws, project, command, played, store_db, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_db}")
    plan = ("host", "plan", "--json")

    def rests_on(*arguments):
        [found] = [
            one for one in json.loads(command(*plan, *arguments).output)["options"] if one["type"][0] == "g"
        ]
        return found["basis"], round(found["samples_per_second"])

    assert rests_on()[0] == "calibration table"
    config = compose([])
    params = flatten({"model": to_plain(config.model), "data": {"image": to_plain(config.data.image)}})
    events = [
        {"event": "params", "values": params},
        {"event": "metrics", "step": 0, "values": {"time/samples_per_second": 61000.0}},
        {"event": "finish", "status": "FINISHED", "error": ""},
    ]
    about = {"tags": {"cnn_tuning.kind": "train"}, "experiment": config.tracking.experiment}
    played.put("spool/one.jsonl", spooled("one", events, **about))
    played.plays(*ends_well(played))
    assert command("host", "run", "--yes", "--run", "run-one").exit_code == 0
    assert rests_on() == ("measured", 61000)
    assert rests_on("model=lab_cnn")[0] != "measured"
    assert rests_on("--measured", "g5.xlarge=70000") == ("measured", 70000)
    started = command("host", "run", "--yes", "--detach", "--run", "run-two", "--measured", "g5.xlarge=70000")
    assert started.exit_code == 0, started.output
    assert re.search(r"g5\.xlarge .* 70,000 +measured ", started.output)
    running = [item["InstanceId"] for item in inventory.instances(aws, "cnn-tuning", "run-two")]
    aws.client("ec2").terminate_instances(InstanceIds=running)
    again = command("host", "run", "--yes", "--detach", "--run", "run-two")
    assert again.exit_code == 0, again.output
    assert re.search(r"g5\.xlarge .* 70,000 +measured ", again.output), "also where a host replaces another"


def test_nothing_starts_without_a_yes(aws, project, command):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    done = command("host", "run")
    assert done.exit_code != 0
    assert "start it?" in done.output
    assert inventory.instances(aws, "cnn-tuning") == []
    assert aws.client("s3").list_objects_v2(Bucket="a-bucket")["KeyCount"] == 0


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("trainer.max_epochs=1",), "put it there"),
        (("host.bucket=other-bucket",), "bucket other-bucket"),
        (("host.budget=0.0001",), "no type can be taken"),
        (("host.gpu_ami=/absent",), "check host.gpu_ami"),
    ],
)
def test_what_is_missing_is_told_before_anything_starts(aws, project, command, overrides, told):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    done = command("host", "run", "--yes", *overrides)
    assert done.exit_code == 1
    assert told in done.output.splitlines()[-1]
    assert inventory.instances(aws, "cnn-tuning") == []


def assert_nothing_was_done(aws):
    assert inventory.instances(aws, "cnn-tuning") == []
    assert all_runs(aws, "cnn-tuning") == []
    assert aws.client("s3").list_objects_v2(Bucket="a-bucket")["KeyCount"] == 0


def test_without_credentials_a_run_is_one_line(aws, project, command, monkeypatch):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    with monkeypatch.context() as nobody:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
            nobody.delenv(f"AWS_{name}", raising=False)
        clients = dict(aws._clients)
        aws._clients.clear()  # they keep the credentials that they were made with
        try:
            done = command("host", "run", "--yes")
        finally:
            aws._clients.update(clients)
    assert done.exit_code == 1
    [line] = done.output.splitlines()
    assert line.startswith("error: sts: no AWS credentials were found: run `aws configure`")
    assert_nothing_was_done(aws)


def test_a_quota_that_is_too_low_is_told_before_anything_is_done(aws, project, command):
    aws.client("s3").create_bucket(Bucket="a-bucket")
    quotas = aws.client("service-quotas")
    stop = intercept(quotas, "GetServiceQuota", lambda _: {"Quota": {"QuotaCode": "L-3819A6DF", "Value": 2.0}})
    try:
        done = command("host", "run", "--yes", "host.candidates=[g5.xlarge]")
    finally:
        stop()
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert "refused: g5.xlarge: the spot quota is 2 vCPUs of 4: ask for more in Service Quotas" in lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert lines[-1] == "error: no type can be taken: the reasons are above"
    assert_nothing_was_done(aws)


def test_the_pages_commands_work_in_an_account(aws, project, command, played):
    page = (ROOT / "docs/hosts.md").read_text()
    lines = [line[2:] for line in page.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 9
    (project / ".dvc/config").unlink()
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "-f"], cwd=project, check=True)
    for line in lines:
        program, *arguments = line.replace("my-bucket", "a-bucket").split()
        played.run = "my-run"
        played.plays(*ends_well(played))
        if arguments[:2] == ["host", "tunnel"] and arguments[-1] != "--ssh":
            arguments.append("--ssh")  # the ports of the page may be in use here
        if program == "cnn-tuning":
            done = command(*arguments)
            assert done.exit_code == 0, f"{line}: {done.output}"
        else:
            subprocess.run([program, *arguments], cwd=project, check=True)
        if arguments[:2] == ["remote", "init"]:  # moto would refuse to write: it knows no TLS
            aws.client("s3").delete_bucket_policy(Bucket="a-bucket")
    assert (project / "dvc.lock").read_text() == LOCK
