"""`cnn-tuning host status`, `down` and `cost`: what there is of this project, what it costs, and the end of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import HostConfig, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import Needed, figure, new_table, print_table

if TYPE_CHECKING:
    from datetime import datetime

    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import Leftover, Thing
    from cnn_tuning.cloud.ledger import Bill
    from cnn_tuning.serving.teardown import Endpoint


def status(overrides: Sequence[str], *, as_json: bool) -> None:
    """Print everything of the project that costs money; exit 1 if something should not be there."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import costly, leftovers, utc_now

    host = compose_sections(Needed, overrides).host
    aws, now = Aws(host.region), utc_now()
    things, notes = costly(aws, host, now)
    runs = {thing.run for thing in things}
    idle = [item for item in leftovers(aws, host.project) if item.run not in runs]
    answering = _endpoints(aws, host, notes)
    if as_json:
        rows = [{**asdict(t), "hours": t.hours(now), "usd": t.usd(now)} for t in things]
        told = {"region": host.region, "costs": rows, "endpoints": [asdict(e) for e in answering],
                "leftovers": [asdict(i) for i in idle], "notes": notes}  # fmt: skip
        click.echo(json.dumps(told, indent=1, default=str))
    else:
        _print_status(host, things, answering, idle, notes, now)
    if idle or any(thing.warnings for thing in things):
        raise click.exceptions.Exit(1)


def _endpoints(aws: Aws, host: HostConfig, notes: list[str]) -> list[Endpoint]:
    """Return the endpoints that `deploy` has made: they cost until they are removed, whatever hosts do."""
    from cnn_tuning.serving.teardown import endpoints

    try:
        return endpoints(aws, host.project)
    except UserError as error:
        notes.append(f"endpoints could not be asked for: {error}")
        return []


def _tell(endpoints: Sequence[Endpoint]) -> None:
    for one in endpoints:
        price = "price unknown" if one.dollars_per_hour is None else f"${one.dollars_per_hour:.3f} per hour"
        remedy = f"cnn-tuning deploy down serving.endpoint.name={one.name}"
        click.echo(f"endpoint {one.name} ({one.instances} × {one.instance_type}, {price}) still costs: {remedy}")


def _print_status(
    host: HostConfig,
    things: Sequence[Thing],
    endpoints: Sequence[Endpoint],
    idle: Sequence[Leftover],
    notes: Sequence[str],
    now: datetime,
) -> None:
    from cnn_tuning.cloud.aws import hide_account

    if things:
        table = new_table("run", "", "", "state", "hours", "$/h", "$ so far", "owner", "ends")
        for thing in things:
            table.add_row(
                *(thing.run, thing.id, thing.what, thing.state, figure(thing.hours(now), ".2f")),
                *(figure(thing.per_hour, ".4f"), figure(thing.usd(now), ".3f")),
                *(hide_account(thing.tags.get("owner", "")), thing.tags.get("expires-at", "")),
            )
        print_table(table)
        known = [thing.per_hour for thing in things if thing.per_hour is not None]
        rest = "" if len(known) == len(things) else ", without unknown prices"
        click.echo(f"${sum(known):.4f} per hour{rest}")
    elif not endpoints:
        click.echo(f"nothing of project {host.project} costs money in {host.region}")
    _tell(endpoints)
    for thing in things:
        for warning in thing.warnings:
            click.echo(
                f"WARNING: {thing.kind} {thing.id} of run {thing.run} {warning}: cnn-tuning host down {thing.run}"
            )
    for item in idle:
        remedy = f"cnn-tuning host down {item.run}"
        click.echo(f"left over of run {item.run}: {item.kind} {item.name} (costs nothing): {remedy}")
    for note in notes:
        click.echo(note)


def down(run: str | None, overrides: Sequence[str], *, every: bool) -> None:
    """End the hosts of a run, or of all runs, and remove what they were made of."""
    from cnn_tuning.cloud import ledger
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import costly, utc_now
    from cnn_tuning.cloud.names import check_run
    from cnn_tuning.cloud.teardown import all_runs, end_hosts, remove

    if (run is None) == (not every):
        raise UserError("name a run, or give --all (`cnn-tuning host status` names those there are)")
    host = compose_sections(Needed, overrides).host
    aws = Aws(host.region)
    things: list[Thing] = []
    problems: list[str] = []
    try:  # what it cost is worth knowing, not worth failing for
        things = costly(aws, host, utc_now())[0]
    except UserError as error:
        problems.append(str(error))
    end_hosts(aws, host.project, run and check_run(run))
    ended = [thing for thing in things if run in (None, thing.run)]
    ledger.write(ledger.bills(ended, host, utc_now(), ended=True))
    _note_ends(aws, host, {thing.run for thing in ended if thing.kind == "host"})
    for name in [run] if run else all_runs(aws, host.project):
        try:
            removed = remove(aws, host.project, name)
        except UserError as error:
            problems.append(str(error))
            continue
        hosts = [f"host {thing.id}" for thing in ended if thing.run == name and thing.kind == "host"]
        click.echo(
            f"{name}: {', '.join([*hosts, *removed]) or 'nothing was left'}{' removed' if hosts + removed else ''}"
        )
    if problems:
        raise UserError("\n".join(problems))
    if every:
        notes: list[str] = []
        left = _endpoints(aws, host, notes)
        _tell(left)
        for note in notes:
            click.echo(note)
        if not left and not notes:
            click.echo(f"nothing of project {host.project} is left in {host.region}")


def _note_ends(aws: Aws, host: HostConfig, runs: set[str]) -> None:
    """Write the ends of hosts into their runs' records, for when one is gone on with, if that can be done."""
    from cnn_tuning.cloud.follow import settle
    from cnn_tuning.cloud.inventory import utc_now
    from cnn_tuning.cloud.runs import place_of, read_record, write_record

    for run in sorted(runs) if host.bucket else ():
        with contextlib.suppress(UserError):
            place = place_of(aws, host, run)
            record = read_record(place)
            if record is not None:
                write_record(place, settle(aws, place, record, utc_now()).spent())


def cost(overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what hosts have cost: those that run, and those that were ended from here."""
    from cnn_tuning.cloud import ledger
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import costly, utc_now

    host = compose_sections(Needed, overrides).host
    note, running = "", []
    try:
        aws, now = Aws(host.region), utc_now()
        running = ledger.bills(costly(aws, host, now)[0], host, now)
        ledger.write(_settled(aws, host, {bill.host for bill in ledger.read()}))
    except UserError as error:
        note = f"only what was ended from here: {error}"
    alive = {bill.host for bill in running}
    entries = [*(bill for bill in ledger.read() if bill.host not in alive), *running]
    if as_json:
        click.echo(json.dumps({"hosts": [asdict(entry) for entry in entries], "note": note}, indent=1))
        return
    _print_bills(entries)
    if note:
        click.echo(note)


def _settled(aws: Aws, host: HostConfig, known: set[str]) -> list[Bill]:
    """Return bills of hosts that ended by themselves while nobody watched; their runs' records get it, too."""
    from cnn_tuning.cloud import ledger
    from cnn_tuning.cloud.follow import settle
    from cnn_tuning.cloud.inventory import utc_now
    from cnn_tuning.cloud.runs import place_of, read_record, runs_in, write_record

    found: list[Bill] = []
    for run in runs_in(aws, host) if host.bucket else ():
        place = place_of(aws, host, run)
        record = read_record(place)
        if record is None or all(rented.id in known for rented in record.hosts):
            continue
        settled = settle(aws, place, record, utc_now())
        if settled != record:
            write_record(place, settled)
        found += [bill for bill in ledger.bills_of(settled) if bill.host not in known]
    return found


def _print_bills(entries: Sequence[Bill]) -> None:
    table = new_table("run", "host", "", "hours", "$", "")
    for entry in entries:
        usd, ended = figure(entry.usd, ".3f"), entry.ended or "still runs"
        table.add_row(entry.run, entry.host, entry.what, f"{entry.hours:.2f}", usd, ended)
    if entries:
        print_table(table)
    known = [entry.usd for entry in entries if entry.usd is not None]
    rest = "" if len(known) == len(entries) else f" and {len(entries) - len(known)} of unknown price"
    click.echo(f"${sum(known):.3f} for {len(known)} hosts{rest}")
