"""What a campaign's runs work in: one made project, copies of it, the pipeline's course, servers beside it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mlflow_server import MlflowServer
from project import BIN, ROOT, Project
from seaweed import BUCKET, Seaweed

MARK = "CNN_TUNING_CHAOS"  # in the environment of every process that a run starts
PARAMS = f"""\
experiment: smoke
seed: 0
data: {{sources: [{{uri: "s3://{BUCKET}/digits/", unsigned: false}}]}}
trainer: {{max_epochs: 6, checkpoint_every_s: 0.001}}
"""
# `=== NAME` begins each part of a run that is no stage.
PIPELINE = """\
set -e
echo === repro; dvc repro
echo === push; dvc push
echo === pull; rm -rf ../pulled; git clone -q . ../pulled; cp dvc.lock params.lock.yaml ../pulled; cd ../pulled
dvc pull train tune evaluate
echo === done
"""
BEGINS = re.compile(rb"^(?:=== (\w+)|Running stage '(\w+)')", re.M)
CODE = ("src", "conf", "dvc.yaml", ".dvcignore")
LONGEST_S = 900


@dataclass
class Place:
    """One run's folder with its project, its own temporary folder, and its processes."""

    folder: Path
    mark: str
    environment: dict[str, str]
    log: int = 0
    process: subprocess.Popen[bytes] | None = None
    printed: list[Path] = field(default_factory=list)

    @property
    def project(self) -> Path:
        """Return the project's folder."""
        return self.folder / "project"

    def start(self) -> None:
        """Start the pipeline in a process group of its own."""
        self.log += 1
        log = self.folder / f"try-{self.log}.log"
        self.printed.append(log)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", PIPELINE],
                cwd=self.project,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send the pipeline's process group a signal."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, seconds: float = LONGEST_S) -> int | None:
        """Wait for the pipeline's end and return its exit status; None where it hung and was killed."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
            return None

    def reached(self) -> str:
        """Return the part of the pipeline that is under way."""
        found = BEGINS.findall(self.printed[-1].read_bytes())
        return (found[-1][0] or found[-1][1]).decode() if found else ""

    def tell(self) -> str:
        """Return the last lines of the last try."""
        lines = self.printed[-1].read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-400:]

    def run(self, *command: str) -> str | None:
        """Run a command in the project; return None, or the last lines of one that failed."""
        done = subprocess.run(command, cwd=self.project, env=self.environment, capture_output=True, text=True)
        return f"{done.stdout}{done.stderr}"[-300:] if done.returncode else None

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that this run has started, however far they went."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                mine = process.environ().get(MARK) == self.mark
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """End all that this run has started."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def orphans(self, seconds: float = 180) -> list[str]:
        """Wait for all processes of this run to leave by themselves; return and end those that do not."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        told = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                told.append(" ".join(process.cmdline())[:120])
        self.end()
        return told


@dataclass
class Workshop:
    """The made project and the servers that all runs share."""

    folder: Path
    commit: str  # whose code is struck; empty: that of the working tree

    def __post_init__(self) -> None:
        self.code = code_of(self.commit)
        self.weed = Seaweed(self.folder / "seaweed")
        self.mlflow: MlflowServer | None = None
        self.faketime = faketime_library()

    @property
    def template(self) -> Path:
        """Return the made project."""
        return self.folder / "template" / self.code

    def open(self) -> None:
        """Make the project if it is not there yet, and start the S3 server."""
        if not (self.template / "ready").exists():
            self._make()
        self.weed.start()
        data = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets/data/digits.csv.gz"  # type: ignore
        self.weed.put("digits/digits.csv", gzip.decompress(data.read_bytes()))

    def close(self) -> None:
        """Stop the servers."""
        self.weed.kill()
        if self.mlflow is not None:
            self.mlflow.kill()

    def _make(self) -> None:
        shutil.rmtree(self.template, ignore_errors=True)
        project = Project(self.template / "project", PARAMS)
        if self.commit:
            for name in CODE:
                shutil.rmtree(project.path / name, ignore_errors=True)
            packed = subprocess.run(
                ["git", "archive", self.commit, *CODE], cwd=ROOT, capture_output=True, check=True
            )
            subprocess.run(["tar", "-x", "-C", str(project.path)], input=packed.stdout, check=True)
        project.run("dvc", "remote", "add", "-d", "store", f"s3://{BUCKET}/dvc")
        project.commit("remote")
        # Bytecode once for all runs; compiled files count as no change.
        shutil.copytree(project.path / "src", self.template / "src")
        project.run(sys.executable, "-m", "compileall", "-q", str(self.template / "src"))
        code = "import sys; from cnn_tuning.tracking.store import open_store; open_store(sys.argv[1])"
        database = f"sqlite:///{self.template}/mlflow.db"
        project.run(sys.executable, "-c", code, database, PYTHONPATH=str(self.template / "src"))
        (self.template / "ready").touch()

    def place(self, folder: Path, *, tracked: bool = False, clock: bool = False) -> Place:
        """Return a copy of the project in `folder`, with a tracking server or a clock of its own where asked."""
        shutil.copytree(self.template / "project", folder / "project", symlinks=True)
        (folder / "tmp").mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_", "DVC_", "OMP_"))}
        environment = {
            **kept,
            **self.weed.environment,
            "PATH": f"{BIN}:{kept['PATH']}",
            "PYTHONPATH": str(self.template / "src"),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "DVC_NO_ANALYTICS": "1",
            "COLUMNS": "200",
            "TMPDIR": str(folder / "tmp"),
            MARK: str(folder),
        }
        if tracked:
            self.mlflow = MlflowServer(folder / "server")
            self.mlflow.folder.mkdir()
            shutil.copy(self.template / "mlflow.db", self.mlflow.folder / "mlflow.db")
            self.mlflow.start()
            environment["MLFLOW_TRACKING_URI"] = self.mlflow.uri
        else:
            shutil.copy(self.template / "mlflow.db", folder / "project/mlflow.db")
        if clock and self.faketime is not None:
            (folder / "clock").write_text("+0\n")
            environment |= {
                "LD_PRELOAD": str(self.faketime),
                "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        return Place(folder, str(folder), environment)

    def store(self, place: Place) -> Path:
        """Return the database that a run's tracking goes to."""
        own = place.folder / "server/mlflow.db"
        return own if own.exists() else place.project / "mlflow.db"


def faketime_library() -> Path | None:
    """Return libfaketime: of Debian's package, of Python's, or what FAKETIME_LIBRARY names."""
    places = [Path(os.environ.get("FAKETIME_LIBRARY", "/nowhere"))]
    places += Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    spec = importlib.util.find_spec("libfaketime")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "vendor/libfaketime/src/libfaketime.so.1")
    return next((place for place in places if place.is_file()), None)


def code_of(commit: str) -> str:
    """Return what tells the code of one campaign from another's: commits that leave `CODE` alone have the same."""
    digest = hashlib.sha256()
    if commit:
        named = ["git", "rev-parse", *(f"{commit}:{name}" for name in CODE)]
        digest.update(subprocess.run(named, cwd=ROOT, capture_output=True, check=True).stdout)
        return digest.hexdigest()[:12]
    for path in (ROOT / name for name in CODE):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
