"""What EC2 is asked for, as plain mappings: boot script, launch template, fleet, guard schedule. Pure."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnn_tuning.cloud.names import Order, as_list, name_of, tags_of, token
from cnn_tuning.config import HostConfig
from cnn_tuning.errors import UserError

BOOT = Path(__file__).with_name("boot.sh")
LARGEST_USER_DATA = 16 * 1024
# The host ends itself this much before the schedule does: it still uploads its log.
MARGIN_MINUTES = 3


def boot_script(
    host: HostConfig,
    order: Order,
    minutes: int,
    root: str = "/opt/cnn-tuning",
    *,
    mode: str = "pipeline",
    price_per_hour: float | None = None,
) -> str:
    """Return the user data: the settings, safely quoted, and `boot.sh`.

    `mode`: `pipeline`, or `interactive` for MLflow and JupyterLab until the host ends. `price_per_hour`: the
    dearest that the host may turn out to be; what it cost is then told with its state.
    """
    if not host.bucket:
        raise UserError("host.bucket is not set: make one with `cnn-tuning remote init BUCKET`")
    settings = {
        "RUN": order.run,
        "ATTEMPT": str(order.attempt),
        "MODE": mode,
        "COMMIT": order.commit,
        "REGION": host.region,
        "BUCKET": host.bucket,
        "PREFIX": host.prefix,
        "ROOT": root,
        "LIFETIME_MINUTES": str(max(1, minutes - MARGIN_MINUTES)),
        "IDLE_LOOKS": str(host.idle_minutes),
        "LOOK_EVERY_S": "60",
        "PRICE_PER_HOUR": "" if price_per_hour is None else f"{price_per_hour:.4f}",
    }
    head = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    script = f"#!/bin/bash\n{head}{BOOT.read_text()}"
    if len(script.encode()) > LARGEST_USER_DATA:
        raise UserError(f"the boot script has {len(script.encode())} bytes, EC2 takes {LARGEST_USER_DATA}")
    return script


def launch_template(
    host: HostConfig, order: Order, *, image: str, root_device: str, group: str, script: str
) -> dict[str, Any]:
    """Return the arguments of CreateLaunchTemplate."""
    tags, name = as_list(tags_of(host.project, order)), name_of(host.project, order.run)
    disk = {"Encrypted": True, "DeleteOnTermination": True, "VolumeType": "gp3", "VolumeSize": host.disk_gb}
    return {
        "LaunchTemplateName": name,
        "ClientToken": token(order, "template"),
        "TagSpecifications": [{"ResourceType": "launch-template", "Tags": tags}],
        "LaunchTemplateData": {
            "ImageId": image,
            "IamInstanceProfile": {"Name": name},
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
            "BlockDeviceMappings": [{"DeviceName": root_device, "Ebs": disk}],
            "SecurityGroupIds": [group],
            "UserData": base64.b64encode(script.encode()).decode(),
            "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
        },
    }


def fleet(
    host: HostConfig,
    order: Order,
    *,
    market: str,
    template: str,
    places: Sequence[tuple[str, str]],
    images: Mapping[str, str],
    attempt: int = 0,
) -> dict[str, Any]:
    """Return the arguments of CreateFleet for one host in any of the `places` (type, subnet).

    `attempt`: a token is spent by a request that failed, so each further one of the same launch has its own.
    """
    cap = {"MaxPrice": str(host.max_price_per_hour)} if market == "spot" and host.max_price_per_hour else {}
    overrides = [
        {"InstanceType": kind, "SubnetId": subnet, "ImageId": images[kind], **cap}
        for kind, subnet in sorted(places)  # prices may have changed their order since the same was asked
    ]
    options: dict[str, Any] = (
        {
            "SpotOptions": {
                "AllocationStrategy": "price-capacity-optimized",
                "InstanceInterruptionBehavior": "terminate",
            }
        }
        if market == "spot"
        else {"OnDemandOptions": {"AllocationStrategy": "lowest-price"}}
    )
    tags = as_list(tags_of(host.project, order))
    return {
        "Type": "instant",
        "ClientToken": token(order, f"fleet-{market}-{attempt}"),
        "TargetCapacitySpecification": {"TotalTargetCapacity": 1, "DefaultTargetCapacityType": market},
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "$Latest"},
                "Overrides": overrides,
            }
        ],
        "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("fleet", "instance")],
        **options,
    }


def guard(host: HostConfig, order: Order, *, instances: Sequence[str], role: str) -> dict[str, Any]:
    """Return the arguments of CreateSchedule: end the host at `order.ends`, once, whatever it does."""
    return {
        "Name": name_of(host.project, order.run),
        "ClientToken": token(order, "guard"),
        "ScheduleExpression": f"at({_utc(order.ends):%Y-%m-%dT%H:%M:%S})",
        "ScheduleExpressionTimezone": "UTC",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "ActionAfterCompletion": "DELETE",
        "Target": {
            "Arn": "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances",
            "RoleArn": role,
            "Input": json.dumps({"InstanceIds": list(instances)}),
            "RetryPolicy": {"MaximumRetryAttempts": 20, "MaximumEventAgeInSeconds": 3600},
        },
    }


def _utc(time: datetime) -> datetime:
    return time.astimezone(UTC)
