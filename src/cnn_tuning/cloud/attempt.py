"""One attempt of a run on this host: what it uploads while it works, how it ends, what it says of itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnn_tuning.cloud import checkpoint
from cnn_tuning.cloud.metadata import Metadata
from cnn_tuning.cloud.runfolder import RunFolder
from cnn_tuning.cloud.supervise import Ended, Output
from cnn_tuning.errors import UserError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
# EC2 gives two minutes from the notice: 5 s until it is seen, 55 s for the training to save and end, this, and
# what is left for the last word.
SAVING_S = 45.0
# Nothing presses where the pipeline itself has failed.
UNHURRIED_S = 900.0
# What a push has uploaded so far stays there: the next one goes on.
PUSH_S = 600.0
RESULTS = ("dvc.lock", "params.lock.yaml")
SPOOL = Path(".state/spool")
KEEP = "keep"  # as tracking.spool names it
STOP = "stop.json"  # the laptop's budget watcher
RECORD = "run.json"  # the laptop's record of the run's hosts
STATES = {"notice": "interrupted", "signal": "interrupted", "lifetime": "over-budget", "asked": "over-budget"}


@dataclass
class Attempt:
    """At work in the project's folder. `told`: the file that holds the state once it has been said."""

    folder: RunFolder
    region: str
    attempt: int
    told: Path
    began: float
    price_per_hour: float | None = None
    output: Output = field(default_factory=Output)
    metadata: Metadata = field(default_factory=Metadata)
    project: Path = Path()
    _saved: Any = None
    _pushed: bytes = b""
    # Two archives at a time would take the same number, two pushes each other's lock.
    _archiving: threading.Lock = field(default_factory=threading.Lock)
    _pushing: threading.Lock = field(default_factory=threading.Lock)

    def learn_price(self) -> None:
        """Take over what this very host costs, as the laptop notes it; until then the highest price stands."""
        with contextlib.suppress(UserError, OSError):
            record = self.folder.get_json(RECORD) or {}
            for host in record.get("hosts", []):
                if host["attempt"] == self.attempt:
                    self.price_per_hour = float(host["per_hour"])

    def keep_files(self) -> None:
        """Have the spool keep what runs logged as files: the laptop's store gets them, not only this host's."""
        spool = self.project / SPOOL
        spool.mkdir(parents=True, exist_ok=True)
        (spool / KEEP).touch()

    def report(self) -> bool:
        """Upload what the pipeline printed last; return whether the laptop wants this attempt to end."""
        self.folder.put_json(
            "progress.json", {"at": _now(), "stage": self.output.stage, "lines": list(self.output.lines)}
        )
        stop = self.folder.get_json(STOP)
        return isinstance(stop, dict) and stop.get("attempt") == self.attempt

    def archive(self) -> None:
        """Upload the unfinished work if it has changed."""
        with self._archiving:
            seen = [_mark(self.project / file) for file in checkpoint.files_of(self.project)]
            if seen != self._saved:
                entry = checkpoint.save(self.folder, self.project, self.attempt, self.output.stage)
                self._saved = seen
                print(f"saved {entry['key']}: {entry['bytes']:,} bytes", flush=True)

    def push(self, timeout: float = PUSH_S) -> None:
        """Push what finished stages made to the DVC remote, if `dvc.lock` has changed; what is there stays."""
        began = time.monotonic()
        if not self._pushing.acquire(timeout=timeout):
            raise UserError(f"dvc push is still at work after {timeout:.0f} s")
        try:
            self._push(timeout - (time.monotonic() - began))
        finally:
            self._pushing.release()

    def _push(self, timeout: float) -> None:
        lock = self.project / "dvc.lock"
        content = lock.read_bytes() if lock.is_file() else b""
        if content == self._pushed:
            return
        # The pipeline may hold the lock between two stages.
        command = ["dvc", "--wait-for-lock", "push", "--quiet"]
        try:
            done = subprocess.run(command, cwd=self.project, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"dvc push took longer than {timeout:.0f} s") from None
        if done.returncode:
            raise UserError(f"dvc push: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        self._pushed = content

    def results(self) -> None:
        """Upload what the laptop reads: the locks and the spool of runs."""
        for name in RESULTS:
            if (self.project / name).is_file():
                self.folder.put_file(name, self.project / name)
        spool = self.project / SPOOL
        files = (f for f in sorted(spool.rglob("*")) if f.is_file() and f.suffix not in (".lock", ".partial"))
        self.folder.put_new("spool", spool, files)

    def tell(self, state: str, code: int) -> None:
        """Say how it stands, to the laptop and to `boot.sh`, unless that has had the last word (an idle host)."""
        if self.told.exists():
            return
        about = {
            "run": self.folder.prefix.rpartition("/")[2],
            "attempt": self.attempt,
            "state": state,
            "exit": code,
            "stage": self.output.stage,
            "at": _now(),
            "instance": self.metadata.read("instance-id"),
            "type": self.metadata.read("instance-type"),
            "hours": round(self.hours, 6),
            "usd": None if self.price_per_hour is None else round(self.hours * self.price_per_hour, 4),
        }
        self.told.write_text(json.dumps(about))
        self.folder.put_json("state.json", about)

    @property
    def hours(self) -> float:
        """Return for how long this host has been paid."""
        return (time.time() - self.began) / 3600

    def conclude(self, ended: Ended) -> int:
        """Save what there is; return the exit status."""
        early = ended.reason != "ended"
        if early:
            print(f"{ended.reason}: the pipeline stopped within {ended.seconds:.1f} s", flush=True)
        self._save_all(SAVING_S if early else UNHURRIED_S)
        _try(self.report)
        if not early:
            return ended.code if ended.code >= 0 else 128 - ended.code
        state = STATES[ended.reason]
        cost = "" if self.price_per_hour is None else f", ${self.hours * self.price_per_hour:.4f} at the most"
        print(f"{state}: {self.hours:.2f} h of this host{cost}; another host can go on", flush=True)
        _try(lambda: self.tell(state, TRY_AGAIN))
        return TRY_AGAIN

    def _save_all(self, within: float) -> None:
        """Upload all there is, side by side, so that a large part does not cost the others their time."""
        steps = {"checkpoint": self.archive, "push": lambda: self.push(within), "results": self.results}
        threads = {name: threading.Thread(target=_try, args=(step,), daemon=True) for name, step in steps.items()}
        until = time.monotonic() + within
        for thread in threads.values():
            thread.start()
        for thread in threads.values():
            thread.join(timeout=max(0.0, until - time.monotonic()))
        if late := [name for name, thread in threads.items() if thread.is_alive()]:
            print(f"error: not uploaded within {within:.0f} s: {', '.join(late)}", file=sys.stderr, flush=True)


def _try(step: Callable[[], object]) -> None:
    """Do one step of the end; one that fails is told, and the next is done."""
    try:
        step()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _mark(path: Path) -> tuple[str, int, int]:
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return str(path), found.st_mtime_ns, found.st_size
    return str(path), 0, 0


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
