"""The deliverer: `python -m cnn_tuning.tracking.deliver SPOOL` brings every run of a spool folder to its store.

One process a folder, at the lowest disturbance to the training beside it. It follows the files while their
writers live, ends the runs of writers that died, and leaves when nothing is left to do. `sync` does the same
once, in the calling process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from cnn_tuning.errors import UserError, redact
from cnn_tuning.tracking import spool as spools
from cnn_tuning.tracking.spool import Progress
from cnn_tuning.tracking.system import sampling

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOOK_EVERY_S = 0.2
DELIVER_EVERY_S = 3.0  # while the writer lives; its end is delivered at once
LONGEST_WAIT_S = 10.0
LAST_TRIES = 3  # once the writer is gone
SHARE = 0.2  # of a core's time at most for metrics in bulk, while their run goes on
BUSY_S = 30.0  # longer than another process takes for its last tries


@dataclass(frozen=True)
class Synced:
    """One run's row in the answer of `cnn-tuning sync`."""

    key: str
    name: str
    uri: str
    state: Literal["delivered", "running", "failed"]
    run_id: str | None
    message: str


def deliver_folder(spool: Path) -> None:
    """Deliver until nothing is left; return at once where another process does so."""
    while spool.is_dir():
        lock = FileLock(spool / spools.LOCK, timeout=0)
        try:
            with lock, sampling(spool):
                seen = _Folder(spool).follow()
        except Timeout:
            return
        # A run that began after the last look saw the lock as held and relies on this process.
        if _sizes(spool) == seen:
            return


def sync(spool: Path, uri: str | None = None) -> list[Synced]:
    """Deliver once whatever a spool folder holds, to each run's own store or all of it to `uri`.

    Raises:
        UserError: there is no such folder, or `uri` is no tracking store.
    """
    from cnn_tuning.tracking.store import absolute

    if not spool.is_dir():
        raise UserError(f"{spool}: no such folder: name the spool of a project (tracking.spool)")
    folder = _Folder(spool, absolute(uri) if uri else None)
    busy = False
    try:
        with FileLock(spool / spools.LOCK, timeout=BUSY_S):
            for job in folder.jobs():
                while not job.is_settled() and job.progress.failures < 2:
                    job.deliver()
                    if job.alive or job.progress.failures == 0:
                        break
    except Timeout:
        busy = True
    return [job.row(busy) for job in folder.jobs()]


class _Folder:
    """All runs of a spool folder, with one client a store."""

    def __init__(self, spool: Path, to: str | None = None) -> None:
        self.spool, self.to = spool, to
        self.clients: dict[str, MlflowClient] = {}
        self.known: dict[str, _Job] = {}
        self.follows = False

    def jobs(self) -> list[_Job]:
        for key in spools.keys(self.spool):
            if key not in self.known:
                # Of most runs that is all that is read: they were delivered long ago.
                opening = spools.opening_of(self.spool, key)
                if opening is not None:
                    self.known[key] = _Job(self, key, opening)
        return list(self.known.values())

    def follow(self) -> dict[str, int]:
        """Deliver until every run is settled; return the sizes of the files then."""
        self.follows = True
        while self.spool.is_dir():
            seen = _sizes(self.spool)
            jobs = self.jobs()
            for job in jobs:
                job.turn()
            if all(job.is_settled() for job in jobs) and _sizes(self.spool) == seen:
                return seen
            time.sleep(LOOK_EVERY_S)
        return {}

    def client(self, uri: str) -> MlflowClient:
        from cnn_tuning.tracking.store import open_store, problem_of

        if uri not in self.clients:
            # MLflow tries a database for minutes, in which this folder is busy to all others.
            if not uri.startswith("http") and (problem := problem_of(uri)):
                raise ConnectionError(problem)
            self.clients[uri] = open_store(uri)
        import mlflow

        mlflow.set_tracking_uri(uri)
        return self.clients[uri]


class _Job:
    """One run on its way into one store."""

    def __init__(self, folder: _Folder, key: str, start: dict[str, Any]) -> None:
        from cnn_tuning.tracking.store import with_password

        self.folder, self.key, self.start = folder, key, start
        self.uri = folder.to or with_password(start["uri"])
        self.written_uri = redact(self.uri)
        self.path = folder.spool / f"{key}.jsonl"
        self.all_progress = spools.progress_of(folder.spool, key)
        self.progress = self.all_progress.setdefault(self.written_uri, Progress())
        self.progress.failures = 0
        self.alive = not self.progress.ended
        self.gave_up = False
        self.retry_at = self.delivered_at = 0.0
        self.failed_size = -1
        self.read_size = 0
        if self._is_done():
            self._drop_files()
        else:
            self.start = spools.start_of(folder.spool, key) or start

    def is_settled(self) -> bool:
        """Say whether nothing is left to do, or no more tries are due."""
        return self.gave_up or self._is_done()

    def turn(self) -> None:
        """Do what is due now."""
        if self.is_settled():
            return
        now = time.time()
        ending = spools.is_ending(self.folder.spool, self.key)
        if ending and self.failed_size not in (-1, self._size()):
            self.retry_at, self.failed_size = 0.0, self._size()  # the end is worth a try of its own
        wait = 0.0 if ending or not self.alive else DELIVER_EVERY_S
        self.alive = self.alive and self._writer_lives()
        if now >= self.retry_at and now - self.delivered_at >= wait:
            self.deliver()
            self.gave_up = self.progress.failures >= LAST_TRIES and (ending or not self.alive)

    def deliver(self) -> None:
        """Send what is new; a failure is noted for the writer and answered with a growing pause."""
        from cnn_tuning.tracking import store
        from cnn_tuning.tracking.replay import Replay

        # Looked at before reading: what a dead process wrote is then all there is.
        lives = self._writer_lives()
        progress, size = self.progress, self._size()
        try:
            client = self.folder.client(self.uri)
            replay = Replay(self.folder.spool, self.key, self.uri, client, progress, self._save, self._rest)
            self._forget_if_store_is_new(client)
            replay.deliver()
            self.alive = lives and not progress.ended
            if not lives and not progress.ended:
                replay.end_dead()
        except Exception as error:
            progress.state, progress.message = "error", store.one_line(error)
            progress.failures += 1
            self.retry_at = time.time() + min(LONGEST_WAIT_S, 0.25 * 2**progress.failures)
            self.failed_size = size
        else:
            progress.state, progress.message, progress.failures = "ok", "", 0
            self.delivered_at, self.read_size = time.time(), size
            if self._is_done():
                self._drop_files()
        progress.attempt_at = time.time()
        self._save()

    def _rest(self, worked_s: float) -> None:
        """Leave the machine to the training, unless it is over or another run waits for its end to arrive."""
        if not self.folder.follows or not self._writer_lives():
            return
        open_jobs = (job for job in self.folder.known.values() if not job.is_settled())
        if not any(spools.is_ending(self.folder.spool, job.key) for job in open_jobs):
            time.sleep(worked_s * (1 / SHARE - 1))

    def _writer_lives(self) -> bool:
        last = self.path.stat().st_mtime * 1000
        if spools.writer_alive(self.start, last):
            return True
        # A run that was interrupted may be another process's by now.
        self.start = spools.start_of(self.folder.spool, self.key) or self.start
        return spools.writer_alive(self.start, last)

    def row(self, busy: bool) -> Synced:
        """Return the run's state as `cnn-tuning sync` shows it."""
        failed = self.progress.state == "error"
        message = "; ".join(filter(None, [self.progress.message, *self.progress.rejected]))
        if busy:
            message = "another process is delivering this folder now"
        return Synced(
            self.key,
            self.start["name"],
            self.written_uri,
            "delivered" if self._is_done() else "failed" if failed else "running",
            self.progress.run_id,
            message,
        )

    def _forget_if_store_is_new(self, client: MlflowClient) -> None:
        """Begin again where the store no longer has the run (the database was removed)."""
        from mlflow.exceptions import MlflowException

        if self.delivered_at or self.progress.run_id is None:
            return
        try:
            client.get_run(self.progress.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.progress.__init__()  # type: ignore[misc]

    def _is_done(self) -> bool:
        # A line that a kill tore is read and never acknowledged.
        return self.progress.ended and self._size() <= max(self.progress.offset, self.read_size)

    def _drop_files(self) -> None:
        """Remove the run's files, unless another store may still ask for them: this one is not the run's own."""
        own = self.written_uri == self.start["uri"]
        if own and self.progress.state == "ok" and not self.progress.rejected:
            spools.drop_files(self.folder.spool, self.key, self.progress.offset)

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _save(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the folder was removed meanwhile
            spools.save_progress(self.folder.spool, self.key, self.all_progress)


def _sizes(spool: Path) -> dict[str, int]:
    sizes = {}
    for key in spools.keys(spool):
        with contextlib.suppress(FileNotFoundError):
            sizes[key] = (spool / f"{key}.jsonl").stat().st_size
    return sizes


def main() -> None:
    """Deliver the spool folder named on the command line."""
    if hasattr(os, "nice"):
        os.nice(10)
    with contextlib.suppress(FileNotFoundError):
        deliver_folder(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
