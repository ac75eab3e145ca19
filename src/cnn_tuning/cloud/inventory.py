"""What of this project exists in a region now, found by tag and name, and what it costs.

Nothing is kept on the laptop for this: a launcher that died is no hindrance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cnn_tuning.cloud.aws import Aws, code_of, telling
from cnn_tuning.cloud.names import GUARD, PATH, as_mapping, name_of, parse_time
from cnn_tuning.cloud.prices import ADDRESS_PER_HOUR, disk_per_hour, on_demand_prices, spot_prices
from cnn_tuning.config import HostConfig
from cnn_tuning.errors import UserError

LIVE = ("pending", "running", "stopping", "stopped", "shutting-down")


@dataclass(frozen=True)
class Thing:
    """One thing that costs money.

    `per_hour` in US dollars, `of_address` of it for a public address; None: its price could not be asked.
    """

    kind: str
    id: str
    run: str
    state: str
    what: str
    since: datetime | None
    per_hour: float | None
    tags: dict[str, str]
    warnings: tuple[str, ...] = ()
    of_address: float = 0.0

    def hours(self, now: datetime) -> float | None:
        """Return for how long it has been there."""
        return None if self.since is None else (now - self.since).total_seconds() / 3600

    def usd(self, now: datetime) -> float | None:
        """Return what it has cost so far, at its present price."""
        hours = self.hours(now)
        return None if hours is None or self.per_hour is None else hours * self.per_hour


@dataclass(frozen=True)
class Leftover:
    """Something of a run that costs nothing, but should not outlive its host."""

    kind: str
    name: str
    run: str


def by_tag(project: str, run: str | None = None) -> list[dict[str, Any]]:
    """Return the filters for what is tagged with the project and a run (any, unless given)."""
    runs = {"Name": "tag:run", "Values": [run]} if run else {"Name": "tag-key", "Values": ["run"]}
    return [{"Name": "tag:project", "Values": [project]}, runs]


def instances(aws: Aws, project: str, run: str | None = None) -> list[dict[str, Any]]:
    """Return the instances that are not terminated yet."""
    filters = [*by_tag(project, run), {"Name": "instance-state-name", "Values": list(LIVE)}]
    with telling("looking for hosts"):
        pages = aws.client("ec2").get_paginator("describe_instances").paginate(Filters=filters)
        return [item for page in pages for group in page["Reservations"] for item in group["Instances"]]


def volumes(aws: Aws, project: str, run: str | None = None) -> list[dict[str, Any]]:
    """Return the volumes."""
    with telling("looking for volumes"):
        pages = aws.client("ec2").get_paginator("describe_volumes").paginate(Filters=by_tag(project, run))
        return [item for page in pages for item in page["Volumes"]]


def addresses(aws: Aws, project: str, run: str | None = None) -> list[dict[str, Any]]:
    """Return the Elastic IP addresses."""
    with telling("looking for addresses"):
        return list(aws.client("ec2").describe_addresses(Filters=by_tag(project, run))["Addresses"])


def leftovers(aws: Aws, project: str) -> list[Leftover]:
    """Return templates, security groups, schedules, roles and profiles of all runs."""
    ec2, iam, tagged = aws.client("ec2"), aws.client("iam"), {"Filters": by_tag(project)}
    schedules = aws.client("scheduler")
    with telling("looking for what is left over"):
        found = [
            Leftover("launch template", item["LaunchTemplateName"], as_mapping(item["Tags"])["run"])
            for item in _all(ec2, "describe_launch_templates", "LaunchTemplates", **tagged)
        ]
        found += [
            Leftover("security group", item["GroupId"], as_mapping(item["Tags"])["run"])
            for item in _all(ec2, "describe_security_groups", "SecurityGroups", **tagged)
        ]
        named = [
            ("schedule", item["Name"])
            for item in _all(schedules, "list_schedules", "Schedules", NamePrefix=name_of(project, ""))
        ]
        named += [("role", item["RoleName"]) for item in _all(iam, "list_roles", "Roles", PathPrefix=PATH)]
        named += [
            ("instance profile", item["InstanceProfileName"])
            for item in _all(iam, "list_instance_profiles", "InstanceProfiles", PathPrefix=PATH)
        ]
    of_project = name_of(project, "")
    return found + [
        Leftover(kind, name, name.removeprefix(of_project).removesuffix(GUARD))
        for kind, name in named
        if name.startswith(of_project)
    ]


def _all(client: Any, operation: str, key: str, **arguments: Any) -> list[dict[str, Any]]:
    return [item for page in client.get_paginator(operation).paginate(**arguments) for item in page[key]]


def has_guard(aws: Aws, project: str, run: str) -> bool:
    """Tell whether a schedule will end this run's host."""
    from botocore.exceptions import ClientError

    with telling("looking for the guard"):
        try:
            aws.client("scheduler").get_schedule(Name=name_of(project, run))
        except ClientError as error:
            if code_of(error) == "ResourceNotFoundException":
                return False
            raise
    return True


def costly(aws: Aws, host: HostConfig, now: datetime) -> tuple[list[Thing], list[str]]:
    """Return everything that costs money, and notes on what could not be asked."""
    hosts = instances(aws, host.project)
    found, notes = prices(aws, hosts)
    things = [_host(aws, host.project, item, found.get(item["InstanceId"]), now) for item in hosts]
    alive = {item["InstanceId"] for item in hosts}
    things += [_volume(host, item, alive) for item in volumes(aws, host.project)]
    things += [_address(item) for item in addresses(aws, host.project)]
    return things, notes


def prices(aws: Aws, hosts: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Return each instance's present price per hour, as far as known."""
    found: dict[str, float] = {}
    notes: list[str] = []
    spot = [item for item in hosts if item.get("InstanceLifecycle") == "spot"]
    try:
        if spot:
            table = spot_prices(aws.client("ec2"), sorted({item["InstanceType"] for item in spot}))
            for item in spot:
                price = table.get(item["InstanceType"], {}).get(item["Placement"]["AvailabilityZone"])
                found |= {} if price is None else {item["InstanceId"]: price}
    except UserError as error:
        notes.append(f"spot prices unknown: {error}")
    others = [item for item in hosts if item not in spot]
    try:
        if others:
            dollars = on_demand_prices(aws, sorted({item["InstanceType"] for item in others}))
            found |= {i["InstanceId"]: dollars[i["InstanceType"]] for i in others if i["InstanceType"] in dollars}
    except UserError as error:
        notes.append(f"on-demand prices unknown: {error}")
    return found, notes


def _host(aws: Aws, project: str, item: dict[str, Any], price: float | None, now: datetime) -> Thing:
    tags = as_mapping(item.get("Tags"))
    market = item.get("InstanceLifecycle", "on-demand")
    what = f"{item['InstanceType']} {market} {item['Placement']['AvailabilityZone']}"
    state = item["State"]["Name"]
    address = ADDRESS_PER_HOUR if item.get("PublicIpAddress") and state != "stopped" else 0.0
    if price is not None:
        price = 0.0 if state == "stopped" else price + address  # then only its volumes cost
    thing = Thing(
        "host", item["InstanceId"], tags["run"], state, what, item["LaunchTime"], price, tags, of_address=address
    )
    warnings = []
    ends, budget, usd = parse_time(tags.get("expires-at")), tags.get("budget", ""), thing.usd(now)
    if ends is None:
        warnings.append("has no expiry")
    elif ends < now:
        warnings.append(f"past its expiry by {(now - ends).total_seconds() / 3600:.1f} h")
    if usd is not None and budget.replace(".", "", 1).isdigit() and usd > float(budget):
        warnings.append(f"over its budget: ${usd:.2f} of ${budget}")
    if state != "shutting-down" and not has_guard(aws, project, thing.run):
        warnings.append("no schedule will end it")
    return replace(thing, warnings=tuple(warnings))


def _volume(host: HostConfig, item: dict[str, Any], hosts: set[str]) -> Thing:
    tags = as_mapping(item.get("Tags"))
    price = disk_per_hour(item["Size"], host.disk_per_gb_month)
    what = f"{item['Size']} GB {item['VolumeType']}"
    held = any(holder["InstanceId"] in hosts for holder in item["Attachments"])
    warnings = () if held else ("belongs to no host",)
    return Thing(
        "volume", item["VolumeId"], tags["run"], item["State"], what, item["CreateTime"], price, tags, warnings
    )


def _address(item: dict[str, Any]) -> Thing:
    tags = as_mapping(item.get("Tags"))
    used = bool(item.get("AssociationId"))
    state, warnings = ("in use", ()) if used else ("idle", ("belongs to no host",))
    id_ = item["AllocationId"]
    return Thing("address", id_, tags["run"], state, "Elastic IP", None, ADDRESS_PER_HOUR, tags, warnings)


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)
