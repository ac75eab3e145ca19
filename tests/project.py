"""A copy of this project in a folder of its own, as a fresh clone would be, for tests that run it for real."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    """Return a loopback port that nothing listens on now, none of those that the system gives to clients."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Project:
    """A Git repository with this project's files and a `params.yaml` of its own."""

    def __init__(self, path: Path, params: str, *, docs: bool = False) -> None:
        self.path, self.printed = path, ""
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            left_out = ("tests/", "bench/") if docs else ("tests/", "bench/", "docs/")
            if (ROOT / name).is_file() and not name.startswith(left_out):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        # The state of this checkout's own pipeline is not part of a test.
        (path / "dvc.lock").unlink(missing_ok=True)
        (path / "params.lock.yaml").unlink(missing_ok=True)
        (path / "params.yaml").write_text(params)
        self.run("git", "init", "-q")
        self.commit("start")

    @classmethod
    def at(cls, path: Path, printed: str = "") -> Project:
        """Return the project that stands at a path already, with what its pipeline printed."""
        project = cls.__new__(cls)
        project.path, project.printed = path, printed
        return project

    def commit(self, message: str) -> None:
        """Commit everything."""
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", message)

    @property
    def environment(self) -> dict[str, str]:
        """Return this environment without what would lead a run elsewhere."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_", "DVC_"))}
        return {
            **kept,
            "PATH": f"{BIN}:{kept['PATH']}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DVC_NO_ANALYTICS": "1",
            "COLUMNS": "200",
        }

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        """Start a command in the project in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, fails: bool = False, **more: str) -> str:
        """Run a command to its end and return what it printed."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert bool(done.returncode) == fails, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def repro(self, *arguments: str) -> str:
        """Run `dvc repro`."""
        return self.run("dvc", "repro", *arguments)

    @property
    def champion(self) -> str:
        """Return which model the registry's alias stands for after one evaluation: baseline or tuned."""
        registered = json.loads(self.text("results/evaluation/registration.json"))
        return [name for name, version in registered.items() if version["promoted"]][-1]

    def text(self, name: str) -> str:
        """Return the text of a file of the project."""
        return (self.path / name).read_text()
