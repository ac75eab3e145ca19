"""Row 29: an object of DVC's remote that is damaged or missing is named before anything is computed on it."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from agents import Agent
from project import BIN
from seaweed import BUCKET, REGION, _weed, seaweed  # noqa: F401

from cnn_tuning.cloud.pulling import pull
from cnn_tuning.errors import UserError

FILES = {"data/a.csv": b"one\n", "data/b.csv": b"two\n", "single.txt": b"three\n"}
URL = f"s3://{BUCKET}/cnn-tuning/dvc"
CONFIG = f"""
[core]
    remote = storage
    no_scm = true
['remote "storage"']
    url = {URL}
    verify = true
"""
LOCK = """
schema: '2.0'
stages:
  make:
    cmd: make
    outs:
    - {{path: data, hash: md5, md5: {folder}.dir, size: 8, nfiles: 2}}
    - {{path: single.txt, hash: md5, md5: {file}, size: 6}}
"""


def md5(content):
    return hashlib.md5(content).hexdigest()


LISTING = json.dumps(
    [{"md5": md5(body), "relpath": name[5:]} for name, body in FILES.items() if name.startswith("data/")]
).encode()


@pytest.fixture
def host(tmp_path, seaweed, monkeypatch):  # noqa: F811
    """A project on a host, with the outputs of its dvc.lock in the remote and nowhere else."""
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    (project / ".dvc/config").write_text(CONFIG)
    (project / "dvc.yaml").write_text("stages: {make: {cmd: make, outs: [data, single.txt]}}\n")
    (project / "dvc.lock").write_text(LOCK.format(folder=md5(LISTING), file=md5(FILES["single.txt"])))
    for body in FILES.values():
        seaweed.put(key_of(body), body)
    seaweed.put(key_of(LISTING) + ".dir", LISTING)
    for name, value in environment(seaweed).items():
        monkeypatch.setenv(name, value)
    return project


def environment(store):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DVC_"))}
    return {**kept, **store.environment, "PATH": f"{BIN}:{kept['PATH']}", "DVC_NO_ANALYTICS": "1"}


def key_of(content):
    return f"cnn-tuning/dvc/files/md5/{md5(content)[:2]}/{md5(content)[2:]}"


@pytest.mark.slow
def test_29_a_whole_remote_is_pulled(host):
    pull(host, REGION)
    assert (host / "data/a.csv").read_text() == "one\n"
    assert (host / "single.txt").read_text() == "three\n"


@pytest.mark.parametrize(("content", "of"), [(b"one\n", "data/a.csv"), (b"three\n", "single.txt")])
def test_29_an_altered_object_is_named(host, seaweed, content, of):  # noqa: F811
    key = key_of(content)
    seaweed.put(key, b"ONE\n")
    with pytest.raises(UserError) as told:
        pull(host, REGION)
    assert seaweed.read(key) == b"ONE\n"  # the fault is real, and still there
    assert f"{of}: object s3://{BUCKET}/{key} is damaged (its hash differs)" in str(told.value)
    assert "dvc push" in str(told.value)


def test_29_a_missing_object_is_named(host, seaweed):  # noqa: F811
    seaweed.client().delete_object(Bucket=BUCKET, Key=key_of(b"two\n"))
    with pytest.raises(UserError, match=r"data/b\.csv: object .* is missing"):
        pull(host, REGION)


def test_29_an_altered_listing_is_named(host, seaweed):  # noqa: F811
    key = f"{key_of(LISTING)}.dir"
    renamed = [{**entry, "relpath": f"x-{entry['relpath']}"} for entry in json.loads(seaweed.read(key))]
    seaweed.put(key, json.dumps(renamed).encode())
    with pytest.raises(UserError) as told:
        pull(host, REGION)
    assert f"data: object s3://{BUCKET}/{key} is damaged" in str(told.value)


@pytest.mark.slow
def test_29_an_output_that_was_never_pushed_is_made_by_its_stage(host, seaweed):  # noqa: F811
    for key in (key_of(b"three\n"), f"{key_of(LISTING)}.dir", key_of(b"one\n"), key_of(b"two\n")):
        seaweed.client().delete_object(Bucket=BUCKET, Key=key)
    pull(host, REGION)
    assert not (host / "data").exists()


@pytest.mark.slow
def test_29_the_host_stops_there_with_one_line(host, seaweed, tmp_path):  # noqa: F811
    seaweed.put(key_of(b"one\n"), b"ONE\n")
    agent = Agent(tmp_path / "agent", seaweed)
    agent.project = host
    process = agent.start("pull", PATH=environment(seaweed)["PATH"])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.splitlines()[-1].startswith("error: data/a.csv: object s3://")
    assert "Traceback" not in printed
