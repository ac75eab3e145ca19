"""Watch a run's last host from here until it ends: looks at EC2 and the bucket in, what became of it out.

The budget watcher, one of the four guards, is in it: it asks the host to save its work and then ends it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.aws import Aws, code_of, telling
from cnn_tuning.cloud.names import parse_time
from cnn_tuning.cloud.plan import extras_per_hour
from cnn_tuning.cloud.runs import Place, Record, Rented, write_record
from cnn_tuning.config import HostConfig
from cnn_tuning.errors import UserError

LOOK_EVERY_S = 5.0
PRICE_EVERY = timedelta(minutes=5)
# So long before the budget is spent the host is asked to save, and so long it may take.
SAVING = timedelta(minutes=3)
GRACE = timedelta(seconds=150)
YOUNG = timedelta(minutes=3)
# Looks in a row that may fail (a laptop that slept, a network that is away): about ten minutes.
FAILURES = 120
STOP = "stop.json"
TERMINATED = 143  # the status of a boot script that the system's shutdown ended
FINAL = ("finished", "failed", "interrupted", "over-budget", "idle")
_GONE = ("shutting-down", "terminated", "stopping", "stopped")
_AT = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")

Verdict = Literal["going", "finished", "failed", "idle", "over-budget", "interrupted", "vanished", "ended"]


@dataclass(frozen=True)
class Look:
    """What was seen of a host. `instance`: EC2's state, None where it is not known there (any more).

    `state`: what it told itself of this attempt, empty if nothing. `problem`: why nothing was seen.
    """

    instance: str | None
    reason: str = ""
    gone_at: datetime | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def stage(self) -> str:
        """Return where the host is in its work."""
        if self.state.get("state") in FINAL:
            return str(self.state["state"])
        return str(self.progress.get("stage") or self.state.get("stage") or self.instance or "gone")

    @property
    def lines(self) -> list[str]:
        """Return the last lines of output."""
        told = self.progress.get("lines")
        return [str(line).rstrip() for line in told] if isinstance(told, list) else []


@dataclass(frozen=True)
class Ended:
    """How a host ended; `record` has its end and price. `asked`: by the budget watcher, to end.

    `saved` False: it did not do so in time. `problem`: why no other one took its place.
    """

    record: Record
    verdict: Verdict
    look: Look
    asked: bool = False
    saved: bool = True
    problem: str = ""


def look_at(aws: Aws, place: Place, rented: Rented) -> Look:
    """Look at EC2 first, at the host's own words after: who is gone then has nothing more to say."""
    item = instance_of(aws, rented.id)
    state, progress = place.read_json("state.json"), place.read_json("progress.json")
    own = state if str(state.get("attempt", 0)) == str(rented.attempt) else {}
    since = parse_time(str(progress.get("at", "")))
    fresh = since is None or since >= datetime.fromisoformat(rented.launched)
    at = _AT.search(item.get("StateTransitionReason", ""))
    # EC2 may not know at once what it has just started.
    young = inventory.utc_now() - datetime.fromisoformat(rented.launched) < YOUNG
    return Look(
        item["State"]["Name"] if item else "pending" if young else None,
        item.get("StateReason", {}).get("Code", ""),
        datetime.fromisoformat(at[1]).replace(tzinfo=UTC) if at else None,
        own,
        # Until the pipeline runs, the boot script's own output is what there is to see.
        progress if progress and fresh else {"lines": place.tail("boot.log")},
    )


def instance_of(aws: Aws, id_: str) -> dict[str, Any]:
    """Return what EC2 says of an instance, empty where it knows none."""
    from botocore.exceptions import ClientError

    with telling("looking at the host"):
        try:
            groups = aws.client("ec2").describe_instances(InstanceIds=[id_])["Reservations"]
        except ClientError as error:
            if code_of(error) != "InvalidInstanceID.NotFound":
                raise
            return {}
    return next((item for group in groups for item in group["Instances"]), {})


def judge(look: Look) -> Verdict:
    """Return what has become of a host: its own last word counts, unless it was only told to shut down."""
    told = look.state.get("state")
    gone = not look.problem and (look.instance is None or look.instance in _GONE)
    # Somebody asked for its end, or the schedule did: nothing may bring it back unasked.
    by_hand = gone and look.reason == "Client.UserInitiatedShutdown"
    if told == "failed" and look.state.get("exit") == TERMINATED:
        if not gone:
            return "going"  # EC2 is about to say why
        return "ended" if by_hand else "vanished" if look.reason.startswith("Server.") else "failed"
    if told == "interrupted":
        return "ended" if by_hand else "interrupted"
    if told in FINAL:
        return told
    return "ended" if by_hand else "vanished" if gone else "going"


def ended_at(look: Look, rented: Rented, now: datetime) -> datetime:
    """Return when a host ended, as far as EC2 or the host itself say; at the latest when its guard was due."""
    told = parse_time(str(look.state.get("at", ""))) if look.state.get("state") in FINAL else None
    due = datetime.fromisoformat(rented.ends)
    return min(look.gone_at or told or min(now, due), now)


def watch(
    aws: Aws, host: HostConfig, place: Place, record: Record, show: Callable[[Record, Look, datetime], None]
) -> Ended:
    """Look every few seconds, show it, and return when the host has ended or its budget is spent.

    Raises:
        UserError: AWS could not be asked for about ten minutes.
    """
    failures, asked = 0, None
    priced = inventory.utc_now()  # at the launch
    while True:
        now = inventory.utc_now()
        if now - priced >= PRICE_EVERY:
            record, priced = _priced(aws, host, place, record), now
        look = _try(aws, place, record)
        failures = failures + 1 if look.problem else 0
        if failures > FAILURES:
            raise UserError(look.problem)
        show(record, look, now)
        verdict = judge(look)
        if verdict != "going":
            at = ended_at(look, record.hosts[-1], now)
            return Ended(
                record.with_last(ended=at.isoformat(timespec="seconds")), verdict, look, asked is not None
            )
        if asked is None and _is_spent(host, record, now):
            asked = _ask_to_save(place, record, now)
        elif asked is not None and now - asked >= GRACE:
            return Ended(record, "over-budget", look, asked=True, saved=False)
        pause()


def pause() -> None:
    """Wait until the next look."""
    time.sleep(LOOK_EVERY_S)


def _try(aws: Aws, place: Place, record: Record) -> Look:
    try:
        return look_at(aws, place, record.hosts[-1])
    except UserError as error:
        return Look(None, problem=str(error))


def _is_spent(host: HostConfig, record: Record, now: datetime) -> bool:
    return record.usd(now + SAVING) >= host.budget


def _ask_to_save(place: Place, record: Record, now: datetime) -> datetime | None:
    try:
        place.write(STOP, json.dumps({"why": "budget", "attempt": record.hosts[-1].attempt}).encode())
    except UserError:
        return None  # asked again at the next look
    return now


def _priced(aws: Aws, host: HostConfig, place: Place, record: Record) -> Record:
    """Return the record with the host's present price, if that is higher than any before."""
    last = record.hosts[-1]
    price = price_of(aws, host, last.id)
    if price is None or price <= last.per_hour:
        return record
    try:
        return write_record(place, record.with_last(per_hour=price))
    except UserError:
        return record.with_last(per_hour=price)


def price_of(aws: Aws, host: HostConfig, id_: str) -> float | None:
    """Return what a host costs per hour now, with disk and address; None where that cannot be asked."""
    try:
        item = instance_of(aws, id_)
        price = inventory.prices(aws, [item])[0].get(id_) if item.get("Placement") else None
    except UserError:
        return None
    return None if price is None else price + extras_per_hour(host)


def settle(aws: Aws, place: Place, record: Record, now: datetime) -> Record:
    """Return the record with the end of a host that ended while nobody watched."""
    if not record.hosts or record.hosts[-1].ended:
        return record
    look = look_at(aws, place, record.hosts[-1])
    if judge(look) == "going":
        return record
    at = ended_at(look, record.hosts[-1], now)
    return record.with_last(ended=at.isoformat(timespec="seconds"))
