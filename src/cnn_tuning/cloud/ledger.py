"""What hosts have cost: a line for each one whose end is known here, in a file beside the pipeline's state."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from cnn_tuning.cloud.inventory import Thing
from cnn_tuning.cloud.runs import Record

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


def bills(things: Iterable[Thing], now: datetime, *, ended: bool = False) -> list[Bill]:
    """Return a bill for each host, up to now."""
    at = now.isoformat(timespec="seconds") if ended else None
    return [
        Bill(thing.run, thing.id, thing.what, thing.hours(now) or 0.0, thing.usd(now), at)
        for thing in things
        if thing.kind == "host"
    ]


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
