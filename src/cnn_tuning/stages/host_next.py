"""The next host of a run, the first or one that replaces another: what it may still cost, and its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import Config, HostConfig
from cnn_tuning.errors import UserError
from cnn_tuning.stages.hosting import planned

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.launch import Started
    from cnn_tuning.cloud.names import Order
    from cnn_tuning.cloud.plan import Option
    from cnn_tuning.cloud.runs import Mode, Place, Record


# EC2 shows by then what it has started.
SHOWN = timedelta(minutes=5)


@dataclass(frozen=True)
class Job:
    """What it takes to start hosts of a run. `options`: the types that may be taken."""

    aws: Aws
    host: HostConfig
    place: Place
    options: tuple[Option, ...] = ()


def allowance(job: Job, record: Record, now: datetime) -> tuple[float, float]:
    """Return the hours and dollars that the next host may take of what the run may cost in all.

    Raises:
        UserError: it would be over before it got to work.
    """
    from cnn_tuning.cloud.names import lifetime
    from cnn_tuning.cloud.plan import dearest_per_hour

    host, dearest = job.host, dearest_per_hour(job.host, job.options)
    usd, hours = host.budget - record.usd(now), host.max_hours - record.hours(now)
    if record.hosts and min(hours, usd / dearest) * 60 <= host.setup_minutes:
        raise UserError(
            f"${max(0.0, usd):.2f} and {max(0.0, hours):.2f} h are left of the run, too little for another host: "
            "allow more with --budget and --max-hours"
        )
    lives = lifetime(hours, usd, dearest).total_seconds() / 3600
    return lives, lives * dearest


def start_next(job: Job, record: Record) -> Record:
    """Start the run's next host, or find the one that runs; return the record with it, kept in the bucket.

    Raises:
        UserError: there is none to be had now, or nothing is left to pay it.
    """
    from cnn_tuning.cloud import inventory
    from cnn_tuning.cloud.launch import launch
    from cnn_tuning.cloud.names import Order, parse_time
    from cnn_tuning.cloud.runs import write_record

    now = inventory.utc_now()
    ends = now + timedelta(hours=allowance(job, record, now)[0])
    if not _is_under_way(job, record, now):
        record = _begun(job, record, now, ends)
    ends = parse_time(record.ends) or ends
    order = Order(record.run, owner(), record.commit, job.host.budget, ends, record.attempts)
    try:
        started = launch(job.aws, job.host, order, job.options, record.mode)
    except BaseException:  # Ctrl-C, too: what was made has been removed
        # A repeated token would give the same answer again.
        write_record(job.place, record.spent())
        raise
    click.echo(f"run {record.run}: host {started.id}, {started.type} {started.market}"
               + (", which ran already" if started.found else ""))  # fmt: skip
    return write_record(job.place, _with_host(job, record, started, order))


def _is_under_way(job: Job, record: Record, now: datetime) -> bool:
    """Tell whether a launch was cut off here whose host runs, or may run although EC2 does not show it yet.

    The first is taken over; the second is asked for again in the same words, as its token demands.
    """
    from cnn_tuning.cloud import inventory

    known = {rented.id for rented in record.hosts}
    found = inventory.instances(job.aws, job.host.project, record.run)
    if {item["InstanceId"] for item in found if item["State"]["Name"] != "shutting-down"} - known:
        return True
    return record.asked is not None and now - datetime.fromisoformat(record.asked) < SHOWN


def _begun(job: Job, record: Record, now: datetime, ends: datetime) -> Record:
    """Clear away what earlier launches left, and return the record with a new one, kept in the bucket."""
    from cnn_tuning.cloud.follow import STOP
    from cnn_tuning.cloud.runs import write_record
    from cnn_tuning.cloud.teardown import renew

    record = record.spent()
    if record.attempts:
        renew(job.aws, job.host.project, record.run)
        job.place.remove(STOP)
    asked, until = (time.isoformat(timespec="seconds") for time in (now, ends))
    return write_record(job.place, replace(record, asked=asked, ends=until))


def _with_host(job: Job, record: Record, started: Started, order: Order) -> Record:
    """Return the record with a host that runs, as EC2 and its tags describe it, if they do so already."""
    from cnn_tuning.cloud import inventory
    from cnn_tuning.cloud.follow import instance_of, price_of
    from cnn_tuning.cloud.names import as_mapping, parse_time
    from cnn_tuning.cloud.plan import dearest_per_hour
    from cnn_tuning.cloud.runs import Rented

    item = instance_of(job.aws, started.id)
    tags = as_mapping(item.get("Tags"))
    rented = Rented(
        id=started.id,
        type=started.type,
        market=started.market,
        attempt=int(tags.get("attempt", order.attempt)),
        launched=item.get("LaunchTime", inventory.utc_now()).isoformat(timespec="seconds"),
        per_hour=price_of(job.aws, job.host, started.id) or dearest_per_hour(job.host, job.options),
        ends=(parse_time(tags.get("expires-at")) or order.ends).isoformat(timespec="seconds"),
    )
    return replace(record, hosts=(*record.hosts, rented), attempts=rented.attempt + 1, asked=None, ends=None)


def options_of(
    config: Config, aws: Aws, measured: Sequence[str] = (), mode: Mode = "pipeline"
) -> tuple[Option, ...]:
    """Print the plan and return the types that may be taken; their AMIs are there."""
    from cnn_tuning.cloud.launch import resolve_image

    found = planned(config, measured, aws, by_hand=mode == "interactive")
    options = tuple(option for option in found if not option.refused)
    if not options:
        raise UserError("no type can be taken: the reasons are above")
    for option in options:
        resolve_image(aws, config.host, option.type)
    return options


def owner() -> str:
    """Return whom a host is tagged with."""
    import getpass

    from cnn_tuning.cloud.aws import hide_account

    return hide_account(getpass.getuser())
