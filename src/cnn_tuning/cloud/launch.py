"""Start one host: an order in, a running host out; or nothing at all is left.

Each step can be done again (names and tokens come from the run), and a host that runs already is found by its
tags before another is asked for: EC2's answers to a repeated token are not relied on alone.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cnn_tuning.cloud import inventory, policies, specification
from cnn_tuning.cloud.aws import Aws, code_of, explain, telling
from cnn_tuning.cloud.names import GUARD, PATH, Order, as_list, as_mapping, name_of, parse_time, tags_of
from cnn_tuning.cloud.plan import Option, dearest_per_hour, unsuited
from cnn_tuning.cloud.runs import Mode
from cnn_tuning.cloud.teardown import remove
from cnn_tuning.config import HostConfig
from cnn_tuning.errors import UserError

# A new role is not known everywhere at once.
PAUSE_S = 5.0
ATTEMPTS = 12
_NO_CAPACITY = {"InsufficientInstanceCapacity", "UnfulfillableCapacity", "SpotMaxPriceTooLow",
                "MaxSpotInstanceCountExceeded", "InsufficientFreeAddressesInSubnet", "Unsupported"}  # fmt: skip


@dataclass(frozen=True)
class Started:
    """A host that runs. `found`: it did so before."""

    id: str
    type: str
    market: str
    found: bool = False


def launch(
    aws: Aws, host: HostConfig, order: Order, options: Sequence[Option], mode: Mode = "pipeline"
) -> Started:
    """Start a host of one of the types of `options` (those not refused), guarded by a schedule.

    Raises:
        UserError: in one line why not, with the remedy; everything made so far has been removed.
    """
    if all(option.refused for option in options):
        raise UserError("no type can be taken: see `cnn-tuning host plan`")
    alive = [i for i in inventory.instances(aws, host.project, order.run) if i["State"]["Name"] != "shutting-down"]
    if alive:
        return _take_over(aws, host, order, alive)
    try:
        return _launch(aws, host, order, [option for option in options if not option.refused], mode)
    except BaseException as error:
        try:
            remove(aws, host.project, order.run)
        except UserError as left:
            raise UserError(f"{error}; and {left}") from None
        raise


def _launch(aws: Aws, host: HostConfig, order: Order, options: Sequence[Option], mode: Mode) -> Started:
    types = [option.type for option in options]
    minutes = int((order.ends - inventory.utc_now()).total_seconds() // 60)
    if minutes < 1:
        raise UserError(f"run {order.run} would end before it starts: give it more hours or budget")
    images = {kind: resolve_image(aws, host, kind) for kind in types}
    places, vpc = find_places(aws, host, types)
    types = sorted({kind for kind, _ in places}, key=types.index)
    make_role(aws, host, order)
    _make_guard_role(aws, host, order)
    template = specification.launch_template(
        host,
        order,
        image=images[types[0]],
        root_device=root_device(aws, images[types[0]]),
        group=make_group(aws, host, order, vpc),
        script=specification.boot_script(host, order, minutes, mode=mode, price_per_hour=_dearest(host, options)),
    )
    made = _make_template(aws, template)
    started = _ask_fleet(aws, host, order, made, places, images)
    _guard(aws, host, order, [started.id])
    return started


def _dearest(host: HostConfig, options: Sequence[Option]) -> float | None:
    try:
        return dearest_per_hour(host, options)
    except UserError:
        return None


def resolve_image(aws: Aws, host: HostConfig, kind: str) -> str:
    """Return the AMI's id for a type."""
    known = host.types.get(kind)
    if known is None or (reason := unsuited(host, known)):
        raise UserError(f"{kind}: {reason if known else 'not in host.types'}")
    parameter = host.gpu_ami if known.gpu else host.cpu_ami
    with telling(f"AMI {parameter}"):
        value = str(aws.client("ssm").get_parameter(Name=parameter)["Parameter"]["Value"])
    if not value.startswith("ami-"):
        raise explain("InvalidAMIID.Malformed", "", f"AMI {parameter}")
    return value


def find_places(aws: Aws, host: HostConfig, types: Sequence[str]) -> tuple[list[tuple[str, str]], str]:
    """Return (type, subnet) where a type is offered, and the subnets' VPC."""
    ec2 = aws.client("ec2")
    default = [{"Name": "default-for-az", "Values": ["true"]}]
    with telling("subnets"):
        wanted = {"SubnetIds": list(host.subnets)} if host.subnets else {"Filters": default}
        subnets = ec2.describe_subnets(**wanted)["Subnets"]
        pages = ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": list(types)}]
        )
        offered = {
            (row["InstanceType"], row["Location"]) for page in pages for row in page["InstanceTypeOfferings"]
        }
    if not subnets:
        raise UserError(f"no default subnets in {host.region}: `aws ec2 create-default-vpc`, or set host.subnets")
    if len({subnet["VpcId"] for subnet in subnets}) > 1:
        raise UserError("host.subnets: must all be of one VPC")
    places = [
        (kind, subnet["SubnetId"])
        for kind in types
        for subnet in subnets
        if (kind, subnet["AvailabilityZone"]) in offered
    ]
    if not places:
        raise UserError(f"no subnet is in a zone of {host.region} that offers {', '.join(types)}")
    return places, subnets[0]["VpcId"]


def root_device(aws: Aws, image: str) -> str:
    """Return the name of an image's root device."""
    with telling(f"AMI {image}"):
        found = aws.client("ec2").describe_images(ImageIds=[image])["Images"]
    if not found:
        raise explain("InvalidAMIID.NotFound", "", f"AMI {image}")
    return str(found[0].get("RootDeviceName") or "/dev/sda1")


def make_role(aws: Aws, host: HostConfig, order: Order) -> None:
    """Make the role and the instance profile of a run's hosts, unless they are there."""
    iam, name = aws.client("iam"), name_of(host.project, order.run)
    if not host.bucket:
        raise UserError("host.bucket is not set: make one with `cnn-tuning remote init BUCKET`")
    rights = policies.of_host(host.project, order.run, host.bucket, host.prefix)
    _role(iam, host, order, name, policies.trust("ec2.amazonaws.com"), rights)
    with telling("instance profile"):
        tags = as_list(tags_of(host.project, order))
        _unless_there(iam.create_instance_profile, InstanceProfileName=name, Path=PATH, Tags=tags)
        held = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        if not held:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def _make_guard_role(aws: Aws, host: HostConfig, order: Order) -> None:
    trusted = policies.trust("scheduler.amazonaws.com", aws.account())
    name = name_of(host.project, order.run) + GUARD
    _role(aws.client("iam"), host, order, name, trusted, policies.of_guard(host.project, order.run))


def _role(iam: Any, host: HostConfig, order: Order, name: str, trusted: Any, rights: Any) -> None:
    with telling("role"):
        _unless_there(
            iam.create_role,
            RoleName=name,
            Path=PATH,
            AssumeRolePolicyDocument=json.dumps(trusted),
            Tags=as_list(tags_of(host.project, order)),
        )
        iam.put_role_policy(RoleName=name, PolicyName="rights", PolicyDocument=json.dumps(rights))


def _unless_there(create: Callable[..., Any], **arguments: Any) -> None:
    from botocore.exceptions import ClientError

    try:
        create(**arguments)
    except ClientError as error:
        if code_of(error) not in ("EntityAlreadyExists", "ConflictException"):
            raise


def make_group(aws: Aws, host: HostConfig, order: Order, vpc: str) -> str:
    """Return the id of a run's security group, made without a way in unless it is there."""
    ec2, name = aws.client("ec2"), name_of(host.project, order.run)
    with telling("security group"):
        same = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [vpc]}]
        found = ec2.describe_security_groups(Filters=same)["SecurityGroups"]
        if found:
            return str(found[0]["GroupId"])
        tags = as_list(tags_of(host.project, order))
        made = ec2.create_security_group(
            GroupName=name,
            Description="No way in; a host of cnn-tuning",
            VpcId=vpc,
            TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
        )
    return str(made["GroupId"])


def _make_template(aws: Aws, template: dict[str, Any]) -> str:
    ec2 = aws.client("ec2")
    name = template["LaunchTemplateName"]
    with telling("launch template"):
        same = [{"Name": "launch-template-name", "Values": [name]}]
        found = ec2.describe_launch_templates(Filters=same)["LaunchTemplates"]
        made = found[0] if found else ec2.create_launch_template(**template)["LaunchTemplate"]
    return str(made["LaunchTemplateId"])


def _ask_fleet(
    aws: Aws,
    host: HostConfig,
    order: Order,
    template: str,
    places: Sequence[tuple[str, str]],
    images: dict[str, str],
) -> Started:
    """Ask on the configured market, then, if so configured, on demand."""
    ec2 = aws.client("ec2")
    markets = [host.market]
    if host.market == "spot" and host.on_demand_fallback:
        markets.append("on-demand")
    codes: list[tuple[str, str]] = []
    for market in markets:
        for attempt in range(ATTEMPTS):
            asked = specification.fleet(
                host, order, market=market, template=template, places=places, images=images, attempt=attempt
            )
            with telling("launch"):
                answer = ec2.create_fleet(**asked)
            for item in answer.get("Instances", []):
                return Started(item["InstanceIds"][0], item["InstanceType"], item.get("Lifecycle", market))
            codes = [(e.get("ErrorCode", "unknown"), e.get("ErrorMessage", "")) for e in answer.get("Errors", [])]
            if not any("iam" in text.lower() and "profile" in text.lower() for _, text in codes):
                break
            time.sleep(PAUSE_S)
        if not codes or {code for code, _ in codes} - _NO_CAPACITY:
            break
    raise _why(codes, market)


def _why(codes: Sequence[tuple[str, str]], market: str) -> UserError:
    """Return the commonest reason, in one line."""
    if not codes:
        return UserError("launch: EC2 started no host and gave no reason: try again")
    code, count = Counter(code for code, _ in codes).most_common(1)[0]
    message = next(text for known, text in codes if known == code)
    return explain(code, message, f"launch ({market}, {count} of {len(codes)} places)")


def _guard(aws: Aws, host: HostConfig, order: Order, ids: Sequence[str]) -> None:
    from botocore.exceptions import ClientError

    scheduler = aws.client("scheduler")
    with telling("guard"):
        role = aws.client("iam").get_role(RoleName=name_of(host.project, order.run) + GUARD)["Role"]["Arn"]
        for left in reversed(range(ATTEMPTS)):
            try:
                _unless_there(
                    scheduler.create_schedule, **specification.guard(host, order, instances=ids, role=role)
                )
                return
            except ClientError as error:
                if code_of(error) != "ValidationException" or "role" not in str(error) or not left:
                    raise
            time.sleep(PAUSE_S)


def _take_over(aws: Aws, host: HostConfig, order: Order, alive: Sequence[dict[str, Any]]) -> Started:
    """Return the host that an earlier attempt started, with the guard that it may not have got round to."""
    if not inventory.has_guard(aws, host.project, order.run):
        told = as_mapping(alive[0].get("Tags")).get("expires-at")
        _make_guard_role(aws, host, order)
        ends = parse_time(told) or order.ends
        _guard(aws, host, replace(order, ends=ends), [item["InstanceId"] for item in alive])
    first = alive[0]
    return Started(
        first["InstanceId"], first["InstanceType"], first.get("InstanceLifecycle", "on-demand"), found=True
    )
