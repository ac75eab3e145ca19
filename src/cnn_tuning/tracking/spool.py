"""The spool: an append-only file of events for each run, and how far each tracking store has taken it in.

    DIR/KEY.jsonl           one JSON event a line; only the run's own process writes
    DIR/KEY/files/N/…       copies of what the run logged as files
    DIR/KEY/system.jsonl    system metrics; only the deliverer's sampling thread writes
    DIR/KEY.delivery.json   per tracking URI a `Progress`; only the deliverer writes
    DIR/deliver.lock        held by the one process that delivers this folder
    DIR/keep                where it is there, files stay: the spool is read elsewhere (a rented host's)

What a run logged as files is removed once its own store has all of the run; the events stay.

An event is on disk before the call that made it returns, and a line without its newline does not count.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cnn_tuning.errors import UserError, redact

LOCK = "deliver.lock"
KEEP = "keep"


@dataclass
class Progress:
    """How far one store has taken one run in: bytes acknowledged, the run there, the last attempt's result."""

    offset: int = 0
    system_offset: int = 0
    run_id: str | None = None
    ended: bool = False
    state: str = "new"  # new | ok | error
    message: str = ""
    attempt_at: float = 0.0
    failures: int = 0
    registered: dict[str, Any] | None = None
    rejected: list[str] = field(default_factory=list)


class Writer:
    """Appends events to one spool file; a call never waits for anything but the local disk."""

    def __init__(self, spool: Path, key: str) -> None:
        self.path = spool / f"{key}.jsonl"
        self._lock = threading.Lock()
        try:
            spool.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._count = self._go_on()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _go_on(self) -> int:
        """Cut off what a killed writer began; return how many files the run has logged.

        No reader has taken half a line, and the next event is to be whole.
        """
        written = self.path.read_bytes()
        if not written.endswith(b"\n"):
            self._file.truncate(written.rfind(b"\n") + 1)
        there = [int(path.name) for path in self.path.with_suffix("").glob("files/*") if path.name.isdigit()]
        return max([0, *there, *map(int, re.findall(rb'"files/(\d+)/', written))])

    def append(self, event: str, **values: Any) -> None:
        """Write one event, stamped with the time in milliseconds."""
        record = {"event": event, "at": round(time.time() * 1000), **values}
        line = json.dumps(record, default=str, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise _unwritable(self.path, error) from None

    def keep(self, source: Path, *, name: str | None = None, link: bool = False) -> str:
        """Copy a file or folder beside the spool (as `name`); return its place relative to the run's folder.

        `link` makes hard links where the file system can: only for files that nobody rewrites in place.
        """
        with self._lock:
            self._count += 1
            place = f"files/{self._count}/{name or source.name}"
        target = self.path.with_suffix("") / place
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            copy: Callable[[str, str], object] = _link_or_copy if link else shutil.copy2
            if source.is_dir():
                shutil.copytree(source, target, copy_function=copy)
            else:
                copy(str(source), str(target))
        except FileNotFoundError:
            raise UserError(f"{source}: no such file or folder to log") from None
        except (OSError, shutil.Error) as error:
            raise _unwritable(target, error) from None
        return place

    def size(self) -> int:
        """Return the bytes written so far."""
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each whole event after `offset` with the offset of its end; a torn last line is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:  # a line torn by a full disk
                event = {"event": "unreadable", "at": 0}
            yield event, offset


def keys(spool: Path) -> list[str]:
    """Return the runs of a spool folder, oldest first."""
    return sorted(path.stem for path in spool.glob("*.jsonl"))


def opening_of(spool: Path, key: str) -> dict[str, Any] | None:
    """Return the event that opened the run, or None while it is not written."""
    event, _ = next(read(spool / f"{key}.jsonl", 0), ({}, 0))
    return event if event.get("event") == "start" else None


def start_of(spool: Path, key: str) -> dict[str, Any] | None:
    """Return the event that opened the run, with the process that writes it now; None while it is not written."""
    event = opening_of(spool, key)
    if event is None:
        return None
    # Not line by line: there may be many runs, and few were resumed.
    written = (spool / f"{key}.jsonl").read_bytes()
    at = written.rfind(b'"event":"resume"')
    end = written.find(b"\n", at)
    if at >= 0 and end >= 0:  # another process writes it now
        later = json.loads(written[written.rfind(b"\n", 0, at) + 1 : end])
        event |= {name: later[name] for name in ("pid", "created", "host")}
    return event


def interrupted(
    spool: Path, about: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[str, float, float] | None:
    """Return the newest run of the same name, kind, parent and parameters if it was cut off.

    Returns:
        its key, and what `spent` says of it.
    """
    for key in reversed(keys(spool)):
        path = spool / f"{key}.jsonl"
        opening, _ = next(read(path, 0), ({}, 0))
        if not opening or any(opening.get(name) != value for name, value in about.items()):
            continue
        events = [event for event, _ in read(path, 0)]
        given: dict[str, Any] = next((event["values"] for event in events if event["event"] == "params"), {})
        ends = [event for event in events if event["event"] == "finish"]
        if given != json.loads(json.dumps(params, default=str)) or (ends and ends[-1]["status"] != "KILLED"):
            return None
        writer = start_of(spool, key) or opening
        here = writer["host"] == platform.node()  # of another machine: that host is gone, its work came here
        if here and not is_ending(spool, key) and writer_alive(writer, 0.0):
            return None  # it is being trained at this moment
        return key, *spent(events)
    return None


def spent(events: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the seconds and US dollars of a run; where its process ended without a word, up to its last event."""
    seconds = usd = price = 0.0
    began: int | None = None
    last = 0
    for event in events:
        if event["event"] in ("start", "resume"):
            if began is not None:
                seconds, usd = _added(seconds, usd, last - began, price)
            began = last = event["at"]
            price = event.get("price_per_hour", price)
        elif event["event"] == "metrics" and "time/seconds" in event["values"]:
            seconds, usd, began = event["values"]["time/seconds"], event["values"].get("cost/usd", usd), None
        last = max(last, event["at"])
    return (seconds, usd) if began is None else _added(seconds, usd, last - began, price)


def _added(seconds: float, usd: float, milliseconds: float, price_per_hour: float) -> tuple[float, float]:
    return seconds + milliseconds / 1000, usd + milliseconds / 3.6e6 * price_per_hour


def drop_files(spool: Path, key: str, end: int) -> None:
    """Remove the files that the run's events up to `end` speak of."""
    folder = spool / key
    if (spool / KEEP).exists() or not any(folder.glob("files/*")):
        return
    for event, after in read(spool / f"{key}.jsonl", 0):
        if after > end:
            return
        for name in ("file", "model", "predictions"):
            if name in event and (found := re.match(r"files/\d+(?=/)", event[name])):
                shutil.rmtree(folder / found[0], ignore_errors=True)


def is_ending(spool: Path, key: str) -> bool:
    """Say whether the run has written its end."""
    path = spool / f"{key}.jsonl"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8000))
        text = file.read()
        return text.rfind(b'"event":"finish"') > text.rfind(b'"event":"resume"')


def progress_of(spool: Path, key: str) -> dict[str, Progress]:
    """Return the delivery of one run by tracking URI (without its password)."""
    try:
        stored = json.loads((spool / f"{key}.delivery.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    names = {f.name for f in fields(Progress)}
    return {uri: Progress(**{k: v for k, v in p.items() if k in names}) for uri, p in stored.items()}


def save_progress(spool: Path, key: str, progress: Mapping[str, Progress]) -> None:
    """Replace the delivery state of one run in one step."""
    path = spool / f"{key}.delivery.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({uri: asdict(p) for uri, p in progress.items()}))
    partial.replace(path)


def writer_identity() -> dict[str, Any]:
    """Return what tells this process from a later one with the same number."""
    import psutil

    return {"pid": os.getpid(), "created": psutil.Process().create_time(), "host": platform.node()}


def writer_alive(start: Mapping[str, Any], last_event_at: float) -> bool:
    """Say whether the process that writes a spool still lives.

    Of another machine's process nothing is known: it counts as alive for an hour after its last event.
    """
    import psutil

    if start.get("host") != platform.node():
        return time.time() - last_event_at / 1000 < 3600
    try:
        process = psutil.Process(start["pid"])
        # The start time is derived from the boot time, which moves a little when the clock is set.
        return abs(process.create_time() - start["created"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or redact(str(error))
    return UserError(f"{path}: cannot write the tracking spool: {reason}: free it or set tracking.spool")
