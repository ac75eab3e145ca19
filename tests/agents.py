"""The host's agent, really run in a project that is a folder, on a pipeline of one slow stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from seaweed import BUCKET, REGION, Seaweed

from cnn_tuning.cloud.attempt import Attempt
from cnn_tuning.cloud.metadata import Metadata
from cnn_tuning.cloud.runfolder import RunFolder

PLACE = "cnn-tuning/runs/run-one"
URL = f"s3://{BUCKET}/{PLACE}"
# As a training does: it works, and on SIGTERM it saves and exits with 143.
STAGE = """
import pathlib, signal, sys, time
state = pathlib.Path(".state/train")
state.mkdir(parents=True, exist_ok=True)
def save(*_):
    (state / "saved").write_text("as far as it got")
    sys.exit(143)
signal.signal(signal.SIGTERM, save if sys.argv[2] == "saves" else signal.SIG_IGN)
print("Running stage 'train':\\npassword=hunter2hunter2", flush=True)
(state / "begun").touch()
for _ in range(int(float(sys.argv[1]) * 50)):
    time.sleep(0.02)
(state / "result").write_text("trained")
"""


class Agent:
    """`python -m cnn_tuning.cloud.agent` with what it needs around it."""

    def __init__(self, folder: Path, store: Seaweed, metadata: str = "http://127.0.0.1:9") -> None:
        self.folder, self.store = folder, store
        self.project = folder / "project"
        self.project.mkdir(parents=True)
        (self.project / "dvc.lock").write_text("schema: '2.0'\n")
        (self.project / "stage.py").write_text(STAGE)
        (folder / "bin").mkdir()
        (folder / "bin/dvc").write_text(f'#!/bin/sh\necho "dvc $*" >>{folder}/calls\n')
        (folder / "bin/dvc").chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.environment = {
            **kept,
            **store.environment,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata,
            "PATH": f"{folder}/bin:{kept['PATH']}",
        }

    def start(
        self, *arguments: str, attempt: int = 0, price: str | None = "3600", **environment: str
    ) -> subprocess.Popen[str]:
        """Start one of its commands."""
        head = ["--at", URL, "--region", REGION, "--attempt", str(attempt), "--told", f"{self.folder}/told.json"]
        head += [] if price is None else ["--price", price]
        return subprocess.Popen(
            [sys.executable, "-m", "cnn_tuning.cloud.agent", *head, *arguments],
            cwd=self.project,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def work(
        self, *options: str, seconds: float = 60, saves: bool = True, attempt: int = 0
    ) -> subprocess.Popen[str]:
        """Start the stage under supervision, with looks every tenth of a second."""
        often = ("--look-every", "0.1", "--progress-every", "0.2")
        stage = (sys.executable, "stage.py", str(seconds), "saves" if saves else "hangs")
        return self.start("run", *often, *options, "--", *stage, attempt=attempt)

    def wait_for(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until a file of the project is there."""
        until = time.monotonic() + 60
        while not (self.project / name).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.02)

    def json(self, name: str) -> Any:
        """Return an object of the run."""
        return json.loads(self.store.read(f"{PLACE}/{name}"))

    @property
    def calls(self) -> list[str]:
        """Return how DVC was called."""
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


def attempt_of(project: Path, store: Seaweed) -> Attempt:
    """Return a host's attempt in this process, of a project that is a folder."""
    return Attempt(
        folder=RunFolder(store.client(), BUCKET, PLACE),
        region=REGION,
        attempt=0,
        told=project.parent / "told.json",
        began=time.time(),
        metadata=Metadata("http://127.0.0.1:9"),
        project=project,
    )
