"""Where a study is kept: a journal file for one machine, or PostgreSQL for several; and a lock beside it.

Whatever a process holds, the system takes back when it dies: a killed one blocks no other.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock, Timeout

from cnn_tuning.errors import UserError, redact

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal.log"
# A restart of PostgreSQL takes seconds.
PATIENCE_S = 60.0
LOCK_WAIT_S = 30.0
# A connection that holds the lock and does nothing belongs to a process that is stopped.
IDLE_S = 60
Result = TypeVar("Result")


class StorageGone(UserError):
    """The storage of the study does not answer, or refuses."""


class JournalLock:
    """The journal's lock: Optuna's own outlives a killed process for 30 s, and leaves half a line behind.

    A last line without its end was cut by a kill or a full disk; a further one would make all unreadable.
    """

    def __init__(self, path: Path, wait_s: Callable[[], float]) -> None:
        self.path, self.wait_s = path, wait_s
        # Not under the name of Optuna's own lock: a dashboard would take it for one that was left behind.
        self._lock = FileLock(path.with_suffix(".flock"), thread_local=False)

    def acquire(self) -> bool:
        """Wait for the lock; drop half a line."""
        self._lock.acquire(timeout=self.wait_s())
        try:
            _drop_half_a_line(self.path)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def _drop_half_a_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def open_storage(uri: str, folder: Path, lock_wait_s: Callable[[], float] = lambda: LOCK_WAIT_S) -> BaseStorage:
    """Return the storage that `uri` means: `journal` (a file in `folder`) or a PostgreSQL database.

    Raises:
        StorageGone: the database does not answer, or refuses.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    folder.mkdir(parents=True, exist_ok=True)
    if uri == "journal":
        path = folder / JOURNAL
        try:
            return JournalStorage(JournalFileBackend(str(path), JournalLock(path, lock_wait_s)))  # type: ignore[arg-type]
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and the search begins anew") from None
    try:
        with alone(uri, folder, lock_wait_s()):  # simultaneous first starts would make the tables twice
            arguments = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
            return RDBStorage(with_driver(uri), engine_kwargs=arguments)
    except Exception as error:
        if not is_passing(error):
            raise
        raise unreachable(uri, error) from None


def alone(uri: str, folder: Path, wait_s: float) -> AbstractContextManager[None]:
    """Hold a lock that only one process of all on this study has at a time."""
    if uri != "journal":
        return _alone_in_database(uri, wait_s)
    return _alone_in_folder(folder, wait_s)


@contextmanager
def _alone_in_folder(folder: Path, wait_s: float) -> Iterator[None]:
    with FileLock(folder / "study.lock", timeout=wait_s):
        yield


@contextmanager
def _alone_in_database(uri: str, wait_s: float) -> Iterator[None]:
    import psycopg

    key = int.from_bytes(hashlib.sha256(b"cnn_tuning.search").digest()[:8], signed=True)
    with psycopg.connect(uri.replace("postgresql+psycopg://", "postgresql://"), connect_timeout=10) as connection:
        connection.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_S}s'")
        connection.execute(f"SET LOCAL lock_timeout = '{wait_s:g}s'")
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (key,))
        yield


def with_driver(uri: str) -> str:
    """Return the address with the name of the driver that is installed."""
    return uri if uri.startswith("postgresql+") else uri.replace("postgresql://", "postgresql+psycopg://", 1)


def is_passing(error: BaseException) -> bool:
    """Return whether this may be over when the storage answers again."""
    import psycopg
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    return isinstance(error, StorageInternalError | DBAPIError | psycopg.OperationalError | Timeout)


def unreachable(uri: str, error: BaseException) -> StorageGone:
    """Return what a person is told of a storage that does not answer."""
    if uri == "journal":
        return StorageGone("the search's journal stays locked: end the process that holds it")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in redact(str(cause)).splitlines() if line.strip()]
    reason = next((line for line in lines if "FATAL" in line or "failed" in line), lines[0] if lines else "")
    return StorageGone(
        f"search.storage {redact(uri)}: the database does not answer or refuses ({reason[:200]}): start it or "
        "mend the address; the same command goes on with the search"
    )


def patiently(call: Callable[[], Result], uri: str, patience_s: Callable[[], float]) -> Result:
    """Return what a call on the storage returns, calling again while the storage does not answer.

    The call must be one that may be repeated: it may have been carried out, and only its answer lost.

    Raises:
        StorageGone: no answer within the seconds that `patience_s` gives, asked each time.
    """
    began, pause = time.monotonic(), 0.1
    while True:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            if time.monotonic() - began >= patience_s():
                raise unreachable(uri, error) from None
        time.sleep(pause)
        pause = min(2.0, pause * 2)
