"""What hosts have cost: a line for each one whose end is known here, in a file beside the pipeline's state."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from cnn_tuning.cloud.inventory import Thing
from cnn_tuning.cloud.plan import extras_per_hour
from cnn_tuning.cloud.runs import Record
from cnn_tuning.config import HostConfig

LEDGER = Path(".state/hosts.jsonl")


@dataclass(frozen=True)
class Bill:
    """A host's time and price. `usd` None: the price could not be asked. `ended` None: it still runs."""

    run: str
    host: str
    what: str
    hours: float
    usd: float | None
    ended: str | None = None


def bills(things: Iterable[Thing], host: HostConfig, now: datetime, *, ended: bool = False) -> list[Bill]:
    """Return a bill for each host, up to now, with its disk and address as in the records of runs."""
    at = now.isoformat(timespec="seconds") if ended else None
    found = []
    for thing in things:
        if thing.kind == "host":
            hours = thing.hours(now) or 0.0
            usd = None
            if thing.per_hour is not None:
                usd = hours * (thing.per_hour - thing.of_address + extras_per_hour(host))
            found.append(Bill(thing.run, thing.id, thing.what, hours, usd, at))
    return found


def bills_of(record: Record) -> list[Bill]:
    """Return a bill for each host of a run that has ended."""
    return [
        Bill(record.run, host.id, f"{host.type} {host.market}", host.hours(now), host.usd(now), host.ended)
        for host in record.hosts
        if host.ended and (now := datetime.fromisoformat(host.ended))
    ]


def write(entries: Iterable[Bill], path: Path = LEDGER) -> None:
    """Append bills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)


def read(path: Path = LEDGER) -> list[Bill]:
    """Return the bills, the last of each host; a line that was cut off is left out."""
    found: dict[str, Bill] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            bill = Bill(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[bill.host] = bill
    return list(found.values())
