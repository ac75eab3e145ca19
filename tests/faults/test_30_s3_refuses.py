"""Row 30: wrong or expired credentials, S3 down, no bucket: told within 15 s, each in its own words."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from agents import PLACE, Agent
from renting import credentials, no_aws  # noqa: F401
from seaweed import BUCKET, REGION, _weed, seaweed  # noqa: F401

from cnn_tuning.cloud.aws import Aws, telling
from cnn_tuning.cloud.pulling import pull
from cnn_tuning.cloud.runfolder import RunFolder
from cnn_tuning.cloud.supply import push
from cnn_tuning.config import SourceConfig
from cnn_tuning.data.sources import fetch
from cnn_tuning.errors import UserError

WITHIN_S = 15
CASES = ("secret", "key", "none", "expired", "bucket", "closed", pytest.param("hangs", marks=pytest.mark.slow))
# What each says on a host, on the laptop and where data are fetched.
CLOUD = {
    "secret": "AWS does not accept the credentials",
    "key": "AWS does not accept the credentials",
    "none": "no AWS credentials were found",
    "expired": "the AWS credentials have expired",
    "bucket": "NoSuchBucket: there is no such bucket",
    "closed": "AWS cannot be reached (Could not connect",
    "hangs": "AWS cannot be reached (Read timeout",
}
DATA = {
    "secret": "S3 SignatureDoesNotMatch",
    "key": "S3 InvalidAccessKeyId",
    "none": "NoCredentialsError",
    "expired": "S3 ExpiredToken",
    "bucket": "S3 NoSuchBucket",
    "closed": "EndpointConnectionError",
    "hangs": "ReadTimeoutError",
}


class _Expired(BaseHTTPRequestHandler):
    """Says what S3 says to credentials that have expired."""

    def do_GET(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def faulty(seaweed, no_aws, monkeypatch):  # noqa: F811
    """Return a function that lets S3 refuse in one way; it returns the environment for that, and the bucket."""
    stops = []

    def fault(case):
        changed = dict(seaweed.environment)
        bucket = BUCKET
        if case == "secret":
            changed["AWS_SECRET_ACCESS_KEY"] = "wrong" * 8
        elif case == "key":
            changed["AWS_ACCESS_KEY_ID"] = "AKIAIOSFODNN7UNKNOWN"
        elif case == "none":
            del changed["AWS_ACCESS_KEY_ID"], changed["AWS_SECRET_ACCESS_KEY"]
        elif case == "expired":
            server = ThreadingHTTPServer(("127.0.0.1", 0), _Expired)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stops.append(server.shutdown)
            changed["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
        elif case == "bucket":
            bucket = "no-such-bucket"
        elif case == "closed":
            changed["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        elif case == "hangs":
            seaweed.signal(signal.SIGSTOP)
            assert seaweed.stopped
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        return changed, bucket

    yield fault
    seaweed.signal(signal.SIGCONT)
    for stop in stops:
        stop()


@pytest.mark.parametrize("case", CASES)
def test_30_on_a_host_before_it_does_anything(faulty, seaweed, tmp_path, case):  # noqa: F811
    changed, bucket = faulty(case)
    agent = Agent(tmp_path, seaweed)
    agent.environment = {name: value for name, value in agent.environment.items() if not name.startswith("AWS_")}
    began = time.monotonic()
    process = agent.start("--at", f"s3://{bucket}/{PLACE}", "restore", **changed)
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < WITHIN_S
    assert process.returncode == 1
    [line] = printed.splitlines()
    assert line.startswith(f"error: bucket {bucket}: checkpoints/latest.json: ")
    assert CLOUD[case] in line


def test_30_a_hiccup_ends_no_run(no_aws, monkeypatch):  # noqa: F811
    answers = [503, 500, 200]

    class Hiccups(_Expired):
        def do_GET(self) -> None:
            status = answers.pop(0)
            body = b'{"key": "k"}' if status == 200 else b"<Error><Code>SlowDown</Code></Error>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hiccups)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    try:
        folder = RunFolder.at(f"s3://{BUCKET}/{PLACE}", REGION, patient=False)  # as `restore` asks
        assert folder.get_json("checkpoints/latest.json") == {"key": "k"}
    finally:
        server.shutdown()
    assert answers == []


@pytest.mark.parametrize("case", CASES)
def test_30_on_the_laptop(faulty, case):
    _, bucket = faulty(case)
    began = time.monotonic()
    with pytest.raises(UserError) as told, telling(f"bucket {bucket}"):
        Aws(REGION).client("s3").get_object(Bucket=bucket, Key="key")
    assert time.monotonic() - began < WITHIN_S
    assert CLOUD[case] in str(told.value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole", [True, False])
def test_30_where_data_are_fetched(faulty, tmp_path, capsys, case, whole, data_config):
    _, bucket = faulty(case)
    source = SourceConfig(f"s3://{bucket}/data/", region=REGION, unsigned=False)
    config = replace(data_config, sources=(source,), **({"files": {}} if whole else {}))
    began = time.monotonic()
    with pytest.raises(UserError) as told:
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert time.monotonic() - began < WITHIN_S
    assert DATA[case] in str(told.value)
    assert f"s3://{bucket}/data/" in str(told.value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "does",
    [lambda project: push(REGION, project), lambda project: pull(project, REGION)],
    ids=["push", "pull"],
)
def test_30_where_dvc_pushes_and_pulls(faulty, tmp_path, case, does):
    _, bucket = faulty(case)
    (tmp_path / ".dvc").mkdir()
    url = f"s3://{bucket}/cnn-tuning/dvc"
    (tmp_path / ".dvc/config").write_text(f"[core]\n    remote = s\n['remote \"s\"']\n    url = {url}\n")
    out = f"{{path: data, hash: md5, md5: {'a' * 32}, size: 1}}"
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages: {{make: {{cmd: make, outs: [{out}]}}}}\n")
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^bucket {bucket}: ") as told:
        does(tmp_path)
    assert time.monotonic() - began < WITHIN_S
    assert CLOUD[case] in str(told.value) and "\n" not in str(told.value)


@pytest.fixture(scope="module")
def data_config():
    from project import ROOT

    from cnn_tuning.config import compose

    return compose(["experiment=digits"], params=None, conf=ROOT / "conf").data


@pytest.mark.slow
def test_30_a_bucket_that_comes_back_is_used_again(seaweed, tmp_path):  # noqa: F811
    agent = Agent(tmp_path, seaweed)
    process = agent.work("--save-every", "0.5", seconds=12)
    agent.wait_for(".state/train/begun", process)
    seaweed.kill()
    lines = []
    while "trying again later" not in "".join(lines):  # the fault is real: an upload has failed
        lines.append(process.stdout.readline())
        assert lines[-1]
    seaweed.start()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed  # it cost no training
    assert agent.json("checkpoints/latest.json")["stage"] == "train"
