"""What a run's hosts left in the bucket comes here: files into the run's folder, `dvc.lock` where it belongs."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from cnn_tuning.cloud.aws import hide_account
from cnn_tuning.cloud.runs import Listed, Place, Record, Rented
from cnn_tuning.errors import UserError

HERE = Path(".state/hosts")
LOG = "boot.log"
FILES = ("dvc.lock", "params.lock.yaml", LOG, "state.json")
SPOOL = "spool"
# The digest of the dvc.lock of this run that was last put in its place here.
TAKEN = "taken"
# Models and results of a run that was asked for with other parameters than those here.
APART = "outs"


def folder_of(run: str) -> Path:
    """Return where a run's things are kept here."""
    return HERE / run


def digest(path: Path) -> str:
    """Return a file's digest, empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def digest_of_params(text: str) -> str:
    """Return a digest of what params.yaml asks for; hosts, tracking, comments and order do not count."""
    import yaml

    try:
        told = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        told = {"damaged": text}
    asked = {key: value for key, value in told.items() if key not in ("host", "tracking")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def fetch(place: Place, record: Record, *, over: bool) -> Path:
    """Bring logs, locks and the spool here; return the folder. `over`: no host writes any of it any more."""
    folder = folder_of(place.run)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        body = place.read(name)
        if body is not None:
            (folder / name).write_bytes(_without_account(body) if name == LOG else body)
    spool = folder / SPOOL
    with ThreadPoolExecutor(8) as pool:
        wanted = [item for item in place.listed(f"{SPOOL}/") if _is_wanted(spool, item)]
        bodies = pool.map(lambda item: place.read(f"{SPOOL}/{item.name}"), wanted)
        for item, body in zip(wanted, bodies, strict=True):
            if body is not None:
                _keep(spool, item.name, priced(body, record) if item.name.endswith(".jsonl") else body)
                if not item.name.endswith(".jsonl"):  # of those, the time says how long nothing has come
                    os.utime(spool / item.name, (item.changed, item.changed))
    for path in spool.glob("*.jsonl"):
        if over:  # a run that was cut off is ended by the replay, which goes by the file's time
            os.utime(path, (0, 0))
    return folder


def _without_account(log: bytes) -> bytes:
    return hide_account(log.decode(errors="replace")).encode()


def _is_wanted(spool: Path, item: Listed) -> bool:
    """Tell whether to fetch an object; how far a run was delivered is this place's own knowledge."""
    name, parts = item.name, PurePosixPath(item.name).parts
    if not parts or ".." in parts or name.startswith("/") or name.endswith(("/", ".delivery.json", ".lock")):
        return False
    known = spool / name
    if name.endswith(".jsonl") or not known.is_file() or known.stat().st_size != item.size:
        return True
    if "-" in item.etag:  # it came in parts: no MD5 of the whole
        return int(known.stat().st_mtime) != int(item.changed)
    with known.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return md5 != item.etag


def _keep(spool: Path, name: str, body: bytes) -> None:
    """Write a file; a run whose events are not those of before, continued, is delivered from its start."""
    path = spool / name
    if path.suffix == ".jsonl" and path.is_file() and not body.startswith(path.read_bytes()):
        key = PurePosixPath(name).parts[0].removesuffix(".jsonl")
        (spool / f"{key}.delivery.json").unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def priced(events: bytes, record: Record) -> bytes:
    """Return a run's events with the host that they come from, its price and what the time on it cost."""
    if not record.hosts:
        return events
    lines = events.split(b"\n")
    return b"\n".join([*(_priced(line, record) for line in lines[:-1]), lines[-1]])


def _priced(line: bytes, record: Record) -> bytes:
    try:
        event: dict[str, Any] = json.loads(line)
        host = _host_at(record, float(event["at"]))
        if event["event"] == "start":
            # What a host tells is its own price, or the share of one of its workers: never a configured one.
            price = event["price_per_hour"] or host.per_hour
            about = {"cnn_tuning.host": f"{host.type} {host.market}", "cnn_tuning.host_run": record.run,
                     "cnn_tuning.price_per_hour": f"{price:.4f}"}  # fmt: skip
            event |= {"price_per_hour": price, "tags": {**event["tags"], **about}}
        elif event["event"] == "resume":
            event["price_per_hour"] = event.get("price_per_hour") or host.per_hour
        elif event["event"] == "metrics" and event["values"].get("cost/usd") == 0:
            usd = event["values"]["time/seconds"] / 3600 * host.per_hour
            event["values"] = {**event["values"], "cost/usd": usd}
        else:
            return line
    except (ValueError, KeyError, TypeError):
        return line
    return json.dumps(event, separators=(",", ":")).encode()


def _host_at(record: Record, at_ms: float) -> Rented:
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    before = [host for host in record.hosts if datetime.fromisoformat(host.launched) <= at]
    return before[-1] if before else record.hosts[0]


def take(folder: Path, record: Record) -> str:
    """Put a run's dvc.lock in its place here; return what was done.

    Raises:
        UserError: it would overwrite what was made here since.
    """
    theirs, ours, taken = folder / "dvc.lock", Path("dvc.lock"), folder / TAKEN
    if digest(ours) == digest(theirs):
        taken.write_text(digest(theirs))
        return "dvc.lock is the host's already"
    # What the run itself left here before it ended is no change made here.
    if digest(ours) not in (record.lock, taken.read_text() if taken.is_file() else record.lock):
        raise UserError(
            f"dvc.lock has changed here since the launch and stays as it is; the host's is {theirs}: to take it, "
            f"`cp {theirs} dvc.lock` and `cnn-tuning host pull {record.run}`"
        )
    for name in ("dvc.lock", "params.lock.yaml"):
        if (folder / name).is_file():
            partial = Path(f"{name}.partial")
            partial.write_bytes((folder / name).read_bytes())
            partial.replace(name)
    taken.write_text(digest(theirs))
    return "dvc.lock is the host's now"
