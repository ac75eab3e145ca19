"""A real S3 server (SeaweedFS) on loopback, for tests; killable and stoppable."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from project import BIN, free_port

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # those of AWS's own examples
REGION = "us-east-1"
BUCKET = "a-bucket"


class Seaweed:
    """`weed server` with a folder of its own; it knows one pair of credentials."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> Seaweed:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        who = {"name": "host", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [who]}))
        loop = "127.0.0.1"
        ports = {
            name: free_port()
            for name in ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
                         "filer.port.grpc", "s3.port.grpc")
        }  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(
                        str(BIN / "weed"),
                        "server",
                        f"-dir={self.folder}",
                        f"-ip={loop}",
                        f"-ip.bind={loop}",
                        "-s3",
                    ),
                    *(f"-{name}={port}" for name, port in ports.items()),
                    *(f"-s3.port={self.port}", f"-s3.config={self.folder}/s3.json", "-s3.port.iceberg=0"),
                    *("-s3.port.lance=0", f"-debug.port={free_port()}", "-master.telemetry=false"),
                    *("-master.volumeSizeLimitMB=64", "-volume.max=0"),
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not self._works():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        return self

    def _works(self) -> bool:
        try:
            httpx.get(self.url, timeout=1, trust_env=False)
            s3 = self.client()
            if BUCKET not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
                s3.create_bucket(Bucket=BUCKET)
            s3.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
        except Exception:
            return False
        return True

    @property
    def environment(self) -> dict[str, str]:
        """Return what leads boto3, DVC and `aws` here, with the right credentials."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
        }

    @functools.cache  # noqa: B019 - a server lives as long as its tests
    def client(self) -> Any:
        """Return boto3's client of it."""
        import boto3
        from botocore.config import Config

        once = Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
        return boto3.Session(KEY, SECRET, region_name=REGION).client("s3", endpoint_url=self.url, config=once)

    def read(self, key: str) -> bytes:
        """Return an object."""
        return self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, body: bytes) -> None:
        """Write an object."""
        self.client().put_object(Bucket=BUCKET, Key=key, Body=body)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the names of the objects below a prefix."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(timeout=30)

    @property
    def stopped(self) -> bool:
        """Say whether it stands still; a process of many threads takes a moment for that."""
        assert self.process is not None
        deadline = time.monotonic() + 5
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


_running: list[Seaweed] = []


@pytest.fixture(scope="session")
def _weed(tmp_path_factory: pytest.TempPathFactory) -> Seaweed:
    # One for all modules that import this fixture, each of which pytest takes for another.
    if not _running:
        _running.append(Seaweed(tmp_path_factory.mktemp("seaweed")).start())
        atexit.register(_running[0].kill)
    return _running[0]


@pytest.fixture
def seaweed(_weed: Seaweed) -> Iterator[Seaweed]:
    """A running S3 server with an empty bucket; the test may stop or kill it."""
    if _weed.process is None or _weed.process.poll() is not None:
        _weed.start()
    s3 = _weed.client()
    for key in _weed.keys(""):
        s3.delete_object(Bucket=BUCKET, Key=key)
    yield _weed
    _weed.signal(signal.SIGCONT)
