"""`cnn-tuning doctor`: what is wrong is named, with what to do, and the command fails."""

from __future__ import annotations

import subprocess

import pytest
from click.testing import CliRunner
from project import ROOT, free_port

from cnn_tuning.cli import cli

GOOD_REMOTE = "[core]\n    no_scm = true\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project's folder without anything wrong."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "params.yaml").write_text("experiment: digits\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(GOOD_REMOTE)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def told() -> tuple[int, dict[str, str]]:
    """Return the exit status, and what is said of each thing that was checked."""
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    said = {line[5:20].strip(): f"{line[:5].strip()} {line[21:]}" for line in done.output.splitlines()}
    return done.exit_code, said


def test_nothing_is_wrong_here(here):
    status, said = told()
    assert said["tracking"].startswith("ok ")
    assert said["data remote"].startswith("note none set: `dvc remote add")
    assert said["dvc.lock"] == "ok none yet"
    assert (status, [about for about, what in said.items() if what.startswith("bad")]) == (0, [])


def test_a_remote_that_is_not_there(here):
    (here / ".dvc/config").write_text("[core]\n    no_scm = true\n    remote = storage\n")
    status, said = told()
    assert (status, said["data remote"]) == (
        1,
        "bad storage: core.remote names a remote that is not there: see `dvc remote list`",
    )


def test_a_remote_that_dvc_cannot_use(here, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a terminal in which no environment is active
    (here / ".dvc/config").write_text(
        f"{GOOD_REMOTE}    remote = storage\n['remote \"storage\"']\n    url = gs://bucket/x\n"
    )
    (here / "a.dvc").write_text(f"outs:\n- md5: {'d' * 32}\n  size: 3\n  hash: md5\n  path: a\n")
    status, said = told()
    assert (status, said["data remote"].split(":")[0]) == (1, "bad gs")
    assert "dvc-gs" in said["data remote"]


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_tracking_store_that_does_not_answer(here, monkeypatch, scheme):
    uri = f"{scheme}://me:hush-hush@127.0.0.1:{free_port()}/runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    status, said = told()
    assert status == 1
    assert said["tracking"].startswith(f"bad {scheme}://")
    assert "refused" in said["tracking"]
    assert "hush-hush" not in " ".join(said.values())


def test_a_tracking_store_that_is_none(here):
    (here / "params.yaml").write_text("experiment: digits\ntracking: {uri: ftp://nowhere}\n")
    status, said = told()
    assert status == 1
    assert said["tracking"].startswith(
        "bad configuration has 1 mistake: params.yaml:2: tracking.uri: got 'ftp://nowhere'"
    )
