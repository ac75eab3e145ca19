"""A run: what a stage computes goes in as params, tags, metrics, files and a model; a spool file comes out.

No call waits for a tracking server and none imports mlflow: `deliver` brings the spool to the store.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from cnn_tuning.config import TrackingConfig
from cnn_tuning.errors import CutOff, UserError, redact, redact_values
from cnn_tuning.tracking import facts, spool, store
from cnn_tuning.tracking.gate import PREDICTIONS, Gate, read_predictions

if TYPE_CHECKING:
    from cnn_tuning.tracking.system import Sample

Status = Literal["FINISHED", "FAILED", "KILLED"]
FAILURE_WAIT_S = 3.0
TOLD = 3  # of what a store refused
TEXT = {".yaml", ".yml", ".json", ".txt", ".md", ".log", ".toml", ".ini", ".csv", ".html"}
TEXT_BYTES = 10_000_000  # a few seconds' reading; what is longer is data
_PICTURE = re.compile(r"(data:image/[\w+.-]+;base64,[A-Za-z0-9+/=]*)")
_deliverers: list[subprocess.Popen[bytes]] = []
_started: set[str] = set()  # by this process: the store was looked at for the first of them


@dataclass(frozen=True)
class Delivery:
    """Where a finished run is: in the store, or in the spool for a later `cnn-tuning sync`.

    `key` names the run in the spool. `registered` has name, alias, version, promoted and reason of a model that
    the run registered; no version where the store made none, and `refused` where it never will. `rejected`: what
    the store refused for good, with its reasons.
    """

    key: str
    state: Literal["delivered", "spooled"]
    run_id: str | None
    uri: str
    message: str
    registered: dict[str, Any] | None
    rejected: tuple[str, ...] = ()


class Run:
    """One run of a stage, an arm or a trial; a context manager that ends it as it went."""

    def __init__(
        self, config: TrackingConfig, uri: str, key: str, writer: spool.Writer, waits: bool = True
    ) -> None:
        self.config, self.uri, self.key, self.waits = config, uri, key, waits
        self.delivery: Delivery | None = None
        self._writer = writer
        self._began = time.time()
        self._before = 0.0, 0.0  # seconds and dollars
        self._events = 0

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        name: str,
        kind: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        waits: bool = True,
        already_s: float = 0.0,
        goes_on: bool = False,
    ) -> Run:
        """Open a run; `params` are flat dotted values, `parent` is the key of the run that this one belongs to.

        `goes_on`: unfinished work is there; if its run was interrupted, this is that run again. `already_s`:
        seconds of its work before, which count in its time and cost. One that does not wait leaves its delivery to
        the background: its parent waits for all.

        Raises:
            UserError: the store does not answer and `config.on_unreachable` is `stop`; no spool can be written.
        """
        uri = store.tracking_uri(config)
        folder = Path(config.spool).absolute()
        problem = None if parent in _started else store.problem_of(uri)
        if problem and config.on_unreachable == "stop":
            raise UserError(
                f"tracking server {uri} is not reachable ({problem}): start it, "
                "or set tracking.on_unreachable=spool to train without it"
            )
        now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        about = {"name": redact(name), "kind": kind, "parent": parent, "experiment": config.experiment}
        before = spool.interrupted(folder, about, redact_values(params)) if goes_on else None
        key = before[0] if before else f"{now}-{re.sub(r'[^a-z0-9]+', '-', kind)}-{secrets.token_hex(4)}"
        writer = spool.Writer(folder, key)
        if problem:
            _say(
                f"tracking server {uri} is not reachable ({problem}): offline, spooling to {config.spool} "
                "(replay with `cnn-tuning sync`)"
            )
        price = {"cnn_tuning.price_per_hour": f"{config.price_per_hour:g}"}
        every = {"cnn_tuning.kind": kind, **price, **_facts(), **(tags or {})}
        if parent is None and os.environ.get("MLFLOW_RUN_ID"):  # started by `mlflow run`
            every["mlflow.parentRunId"] = os.environ["MLFLOW_RUN_ID"]
        if before:
            # Another host may have another price.
            writer.append("resume", price_per_hour=config.price_per_hour, **spool.writer_identity())
        else:
            writer.append(
                "start",
                **about,
                uri=redact(uri),
                tags=redact_values(every),
                price_per_hour=config.price_per_hour,
                system_metrics_every_s=config.system_metrics_every_s,
                **spool.writer_identity(),
            )
        _started.add(key)
        run = cls(config, uri, key, writer, waits)
        run._before = before[1:] if before else (already_s, already_s / 3600 * config.price_per_hour)
        run.log_params(params)
        _start_deliverer(folder, uri)
        return run

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record values (`split/name`) at a step; costs one write to a local file."""
        self._writer.append("metrics", step=step, values={k: float(v) for k, v in metrics.items()})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record flat configuration values; a value once given cannot change."""
        self._writer.append("params", values=redact_values(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._writer.append("tags", values=redact_values(tags))

    def log_dataset(self, *, name: str, digest: str, source: str, split: str) -> None:
        """Record the data that went in: its digest, where it came from and which split it served as."""
        self._writer.append("dataset", name=name, digest=digest, source=redact(source), split=split)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or a folder as it is now, under `folder` in the run."""
        place = self._writer.keep(path)
        kept = self._writer.path.with_suffix("") / place
        for file in kept.rglob("*") if kept.is_dir() else [kept]:
            _redact_file(file)
        self._writer.append("artifact", file=place, folder=folder)

    def register(
        self,
        model: Path,
        *,
        name: str,
        alias: str,
        predictions: Path,
        gate: Gate,
        description: str,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Register a saved pyfunc folder as a new version of `name`; `alias` moves to it if the gate opens.

        `predictions` is a file as `gate.write_predictions` makes it, on the test split.

        Raises:
            UserError: `model` is no saved model, or `predictions` does not read.
        """
        if not (model / "MLmodel").is_file():
            raise UserError(f"{model}: no saved model to register (it has no file MLmodel)")
        read_predictions(predictions)
        self._events += 1
        lineage = {k: v for k, v in _facts().items() if k.startswith("git.")}
        self._writer.append(
            "register",
            id=f"{self.key}.{self._events}",
            name=name,
            alias=alias,
            model=self._writer.keep(model, link=True),
            predictions=self._writer.keep(predictions, name=Path(PREDICTIONS).name),
            gate=asdict(gate),
            description=redact(description),
            tags=redact_values({"cnn_tuning.run": self.key, **lineage, **(tags or {})}),
        )

    def system_samples(self) -> list[Sample]:
        """Return (seconds since the epoch, metric name → value) of each sample of this run so far."""
        from cnn_tuning.tracking import system

        return system.read_samples(system.system_file(self._writer.path.parent, self.key))

    def finish(self, status: Status = "FINISHED", *, error: str = "") -> Delivery:
        """End the run and wait for its delivery: `config.wait_s` at most, 3 s if it failed."""
        if self.delivery is not None:
            return self.delivery
        (seconds, usd), new = self._before, time.time() - self._began
        usd += new / 3600 * self.config.price_per_hour
        self.log_metrics({"time/seconds": seconds + new, "cost/usd": usd})
        self._writer.append("finish", status=status, error=redact(error))
        self._writer.close()
        _start_deliverer(self._writer.path.parent, self.uri)
        if not self.waits:
            self.delivery = Delivery(self.key, "spooled", None, redact(self.uri), "", None)
            return self.delivery
        wait_s = self.config.wait_s if status == "FINISHED" else min(FAILURE_WAIT_S, self.config.wait_s)
        self.delivery = self._wait(wait_s)
        if self.delivery.state == "spooled" or self.delivery.rejected:
            _say(self.delivery.message)
        return self.delivery

    def __enter__(self) -> Run:
        """Return the run."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run; an exception goes on as it is, whatever becomes of the record."""
        if error is None:
            self.finish()
            return
        killed = isinstance(error, KeyboardInterrupt | SystemExit | CutOff)
        try:
            self.finish("KILLED" if killed else "FAILED", error=store.one_line(error))
        except Exception as problem:
            _say(f"the run could not be recorded: {problem}")

    def _wait(self, wait_s: float) -> Delivery:
        began, size, said = time.time(), self._writer.size(), False
        written = redact(self.uri)
        while True:
            progress = spool.progress_of(self._writer.path.parent, self.key).get(written, spool.Progress())
            if progress.ended and progress.offset >= size:
                rejected = tuple(progress.rejected)
                message = f"run {progress.run_id} is in {written}{_refused(rejected)}"
                return Delivery(
                    self.key, "delivered", progress.run_id, written, message, progress.registered, rejected
                )
            failed = progress.state == "error" and progress.failures >= 2 and progress.attempt_at > began
            if failed or time.time() - began >= wait_s:
                why = progress.message or f"no delivery within {wait_s:g} s"
                message = f"not delivered to {written} ({why}): kept in {self.config.spool}; "
                return Delivery(
                    self.key, "spooled", progress.run_id, written, message + "replay with `cnn-tuning sync`", None
                )
            if not said and time.time() - began > 2 and wait_s > FAILURE_WAIT_S:
                said = True
                _say(f"waiting for {written} to take in the run (at most {wait_s:g} s)")
            time.sleep(0.05)


def attach(config: TrackingConfig, ended: Sequence[Delivery], path: Path, folder: str = "") -> None:
    """Record a file with runs that have ended, such as a page on what came of them.

    Waits for its delivery where they were delivered.
    """
    uri, spooled = store.tracking_uri(config), Path(config.spool).absolute()
    runs = [Run(config, uri, delivery.key, spool.Writer(spooled, delivery.key)) for delivery in ended]
    for run in runs:
        run.log_artifact(path, folder)
        run._writer.close()
    _start_deliverer(spooled, uri)
    for run, delivery in zip(runs, ended, strict=True):
        if delivery.state == "delivered":
            late = run._wait(config.wait_s)
            if late.rejected != delivery.rejected:
                _say(late.message)


@functools.cache
def _facts() -> dict[str, str]:
    return facts.gather()


def _start_deliverer(folder: Path, uri: str) -> None:
    """Make sure that a process delivers this spool, apart from this one's signals and terminal."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / spool.LOCK, timeout=0):
            pass
    except Timeout:
        return  # one is at work; it looks again after it lets go
    _deliverers[:] = [process for process in _deliverers if process.poll() is None]
    _deliverers.append(
        subprocess.Popen(
            [sys.executable, "-P", "-m", "cnn_tuning.tracking.deliver", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, store.PRIVATE_URI: uri, "OMP_NUM_THREADS": "1"},
        )
    )


def _refused(rejected: Sequence[str]) -> str:
    if not rejected:
        return ""
    what = "1 event" if len(rejected) == 1 else f"{len(rejected)} events"
    more = "; see its tags for all" if len(rejected) > TOLD else ""
    return f", which refused {what}: {'; '.join(rejected[:TOLD])}{more}"


def _redact_file(path: Path) -> None:
    if path.suffix not in TEXT or not path.is_file() or path.stat().st_size > TEXT_BYTES:
        return
    text = path.read_text(errors="replace")
    # Pictures inside a page hold no text, and would take most of the time.
    clean = "".join(part if i % 2 else redact(part) for i, part in enumerate(_PICTURE.split(text)))
    if clean != text:
        path.write_text(clean)


def _say(text: str) -> None:
    print(redact(text), file=sys.stderr, flush=True)
