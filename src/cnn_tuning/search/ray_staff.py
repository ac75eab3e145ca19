"""The workers of one search on the hosts of a Ray cluster, with the methods of `staff.Staff`.

Each is an actor (a task that can be told something while it works) which runs the worker's process on whatever
host has room for it. Ray restarts none: what becomes of a lost one's trial is the study's matter.
"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.errors import UserError
from cnn_tuning.processes import how_ended
from cnn_tuning.search.ray_cluster import connect, disconnect, room, share
from cnn_tuning.search.ray_host import UNFIT, Job, Seat
from cnn_tuning.search.staff import SAVE_S
from cnn_tuning.search.study import is_gone, process_of

if TYPE_CHECKING:
    from cnn_tuning.search.worker import Spec

MARK = ".search-"
END_S = 10.0
TELL_S = 20.0  # so long a worker may wait for a place before it is told
# `work` waits; so many more calls, such as those for a signal, are answered meanwhile.
CALLS = 10
LOST = -int(signal.SIGKILL)


@dataclass
class RayWorker:
    """An actor and what it was last heard to say. Its tag is part of the name of the process that it runs."""

    actor: Any
    tag: str
    place: int
    log: Path
    job: Job
    since: float
    host_told: Any = None
    ended: Any = None
    host: str = ""
    status: int | None = None
    words: str = ""

    def has(self, name: str) -> bool:
        """Return whether a process's name is this one's."""
        return f"/{self.tag}:" in name

    def fate(self) -> str:
        """Return in a few words how it ended."""
        on = f"on {self.host} " if self.host else ""
        if self.status is None:
            return f"{on}is alive"
        if self.status < 0:
            return f"{on}{self.words or how_ended(self.status)}"
        return f"{on}{how_ended(self.status)} ({self.words})"


class RayStaff:
    """At most `size` workers at a time; connected with the first that is hired."""

    def __init__(self, size: int, folder: Path, spec: Spec, say: Callable[[str], None]) -> None:
        self.size, self.folder, self.spec, self.say = size, folder.resolve(), spec, say
        self.config = spec.search.ray
        self.workers: list[RayWorker] = []
        self.left: list[RayWorker] = []
        self.ray: Any = None
        self.mark = self.folder / f"{MARK}{secrets.token_hex(8)}"
        self._to_kill = self._told = False

    def alive(self) -> list[RayWorker]:
        """Return those that work, or wait for a place; the others are in `left`.

        Raises:
            UserError: a host lacks what the search needs.
        """
        if self._to_kill:
            self._kill()
        working: list[RayWorker] = []
        for worker in self.workers:
            self._listen(worker)
            (working if worker.status is None else self.left).append(worker)
        ended, self.workers = [w for w in self.workers if w.status is not None], working
        for worker in ended:
            self.ray.kill(worker.actor)  # gives its share back
            if worker.status == UNFIT:
                worker.status = 1
                raise UserError(f"host {worker.host}: {worker.words}")
        self._tell_who_waits()
        return self.workers

    def of(self, name: str) -> RayWorker | None:
        """Return the worker with this name."""
        return next((w for w in [*self.workers, *self.left] if w.has(name)), None)

    def is_gone(self, name: str) -> bool:
        """Return whether the process of this name is known to be dead: Ray knows of its own on any host."""
        known = self.of(name)
        if known is None:
            return is_gone(name)
        # What has lost its actor on this machine saves first.
        return known.status is not None and process_of(name) is None

    def end(self, name: str) -> None:
        """Kill a process that gives no sign of life, where Ray reaches it."""
        known = self.of(name)
        if known is None or known.status is not None:
            return
        known.actor.send.remote(int(signal.SIGKILL))
        self.ray.wait([known.ended], timeout=END_S)
        self._listen(known)

    def hire(self) -> None:
        """Ask Ray for one more."""
        ray = self._connected()
        place = min(set(range(self.size)) - {worker.place for worker in self.workers})
        tag, log = f"ray-{secrets.token_hex(4)}", self.folder / f"worker-{place}.log"
        actor = ray.remote(Seat).options(
            num_cpus=self.config.num_cpus, num_gpus=self.config.num_gpus, max_concurrency=CALLS, max_restarts=0
        )
        job = Job(
            spec=asdict(self.spec) | {"tag": tag},
            project=str(Path.cwd()),
            mark=str(self.mark),
            must_share=self._must_share(),
            log=str(log),
        )
        worker = RayWorker(actor.remote(), tag, place, log, job, time.monotonic())
        worker.host_told = worker.actor.host.remote()
        worker.ended = worker.actor.work.remote(job)
        self.workers.append(worker)

    def ask_to_stop(self) -> None:
        """Ask all to save and leave; those that wait for a place need not."""
        for worker in self.workers:
            self._listen(worker)
            if worker.host:
                worker.actor.send.remote(int(signal.SIGTERM))
            else:
                self.ray.kill(worker.actor)

    def kill(self) -> None:
        """End all at once; at the next look, for a signal may have come into Ray."""
        self._to_kill = True

    def wait(self) -> None:
        """Wait until all have left; those that take too long are killed."""
        deadline = time.monotonic() + SAVE_S
        while self.workers:
            if time.monotonic() > deadline:
                self.kill()
            try:
                self.alive()
            except UserError:
                continue  # said before, or too late to matter
            time.sleep(0.1)

    def close(self) -> None:
        """Leave Ray; one of this search's own ends."""
        if self.ray is not None:
            self.ray = None
            disconnect()
            self.mark.unlink(missing_ok=True)

    def _connected(self) -> Any:
        if self.ray is None:
            self.mark.touch()
            self.ray = connect(self.config)
            found, fits = room(self.ray, self.config)
            self.say(f"runs on Ray: {found}; a worker takes {share(self.config)}")
            if not fits and self.config.address is None:
                raise UserError(
                    f"no worker fits here, it takes {share(self.config)}: lower search.ray.num_cpus, num_gpus"
                )
        return self.ray

    def _must_share(self) -> bool:
        """Return whether hosts need this very folder: the study, or the runs, come back by it."""
        from cnn_tuning.tracking.store import tracking_uri

        return self.spec.search.storage == "journal" or not tracking_uri(self.spec.tracking).startswith("http")

    def _listen(self, worker: RayWorker) -> None:
        """Hear whether a worker has begun or ended."""
        from ray.exceptions import ActorUnavailableError, RayError

        wanted = [worker.ended] if worker.host else [worker.host_told, worker.ended]
        for ref in self.ray.wait(wanted, num_returns=len(wanted), timeout=0)[0]:
            try:
                if ref is worker.host_told:
                    worker.host = self.ray.get(ref)
                else:
                    worker.status, worker.words = self.ray.get(ref)
            except ActorUnavailableError:  # out of reach, perhaps not for good: asked again
                if ref is worker.ended:
                    worker.ended = worker.actor.work.remote(worker.job)
            except RayError as error:
                if ref is worker.ended:
                    worker.status, worker.words = _loss(worker, error)

    def _kill(self) -> None:
        self._to_kill = False
        for worker in self.workers:
            worker.actor.send.remote(int(signal.SIGKILL))
        if self.workers:
            self.ray.wait([w.ended for w in self.workers], num_returns=len(self.workers), timeout=END_S)
        for worker in self.workers:
            self.ray.kill(worker.actor)

    def _tell_who_waits(self) -> None:
        """Say once that no host has had room for any worker."""
        waits = bool(self.workers) and not any(w.host for w in [*self.workers, *self.left])
        if waits and not self._told and time.monotonic() - self.workers[0].since > TELL_S:
            self._told = True
            self.say(
                f"waits: Ray has no room for a worker yet ({share(self.config)}; {room(self.ray, self.config)[0]})"
            )


def _loss(worker: RayWorker, error: Exception) -> tuple[int, str]:
    """Return what stands for the status of a worker whose actor is gone, and why."""
    if worker.host:
        return LOST, "was lost: its host or Ray's process there is gone"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return 1, f"Ray could not start it: {lines[-1][:300] if lines else type(error).__name__}"
