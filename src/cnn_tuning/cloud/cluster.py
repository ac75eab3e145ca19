"""A Ray cluster on EC2: what `ray up` is told, with the guards that single hosts have, and what it needs before.

Head on demand, workers on spot. All hosts take the run's role, group and tags: `host status` and `host down` find
them. Each ends itself at the order's end; Ray ends idle workers before.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.cloud import policies
from cnn_tuning.cloud.aws import Aws, code_of, telling
from cnn_tuning.cloud.launch import make_group, make_role
from cnn_tuning.cloud.names import Order, name_of
from cnn_tuning.cloud.specification import MARGIN_MINUTES, launch_template
from cnn_tuning.config import HostConfig

ROOT = "/opt/cnn-tuning"
PROJECT = f"{ROOT}/project"
TOKEN = "~/.ray/auth_token"  # noqa: S105 (a place, where Ray looks by itself)
RAY = f"RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 {PROJECT}/.venv/bin/ray"


@dataclass(frozen=True)
class Kind:
    """One of the cluster's two kinds of host: a type, where it may run, and its image's root device."""

    type: str
    image: str
    root_device: str
    subnets: tuple[str, ...]


def cluster_config(
    host: HostConfig, order: Order, *, head: Kind, worker: Kind, workers: int, group: str, token: Path
) -> dict[str, Any]:
    """Return what `ray up` is told: `workers` spot hosts at most, none before it has work for them."""
    types = host.types
    cores, gpu = types[worker.type].vcpus, types[worker.type].gpu
    cap = {"SpotOptions": {"MaxPrice": str(host.max_price_per_hour)}} if host.max_price_per_hour else {}
    spot = {"InstanceMarketOptions": {"MarketType": "spot", **cap}}
    return {
        "cluster_name": name_of(host.project, order.run),
        "max_workers": workers,
        "idle_timeout_minutes": host.idle_minutes,
        "provider": {
            "type": "aws",
            "region": host.region,
            "cache_stopped_nodes": False,  # ended, not stopped: a stopped one's disk still costs
            "use_internal_ips": True,
        },
        "auth": {"ssh_user": "ubuntu", "ssh_proxy_command": _through_session_manager(host, order)},
        "available_node_types": {
            # No trials on the head, which has the search itself and is not to be taken away.
            "head": {"resources": {"CPU": 0}, "node_config": _node(host, order, head, group)},
            "worker": {
                "min_workers": 0,
                "max_workers": workers,
                "resources": {"CPU": cores, **({"GPU": gpu.count} if gpu else {})},
                "node_config": {
                    **_node(host, order, worker, group),
                    **(spot if host.market == "spot" else {}),
                },
            },
        },
        "head_node_type": "head",
        "file_mounts": {TOKEN: str(token)},
        "setup_commands": _setup(host, order),
        "head_setup_commands": [],
        "head_start_ray_commands": [
            f"{RAY} stop",
            f"ulimit -n 65536; {RAY} start --head --port=6379 --object-manager-port=8076 "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f"{RAY} stop",
            f"ulimit -n 65536; {RAY} start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076",
        ],
    }


def _node(host: HostConfig, order: Order, kind: Kind, group: str) -> dict[str, Any]:
    """Return the arguments of RunInstances: those of a single host's launch template."""
    template = launch_template(
        host, order, image=kind.image, root_device=kind.root_device, group=group, script=_last_will(order)
    )
    data = template["LaunchTemplateData"]
    # Of a template it is encoded; here boto3 does it.
    return {**data, "UserData": _last_will(order), "InstanceType": kind.type, "SubnetIds": list(kind.subnets)}


def _last_will(order: Order) -> str:
    """Return the user data: the host ends itself in time, whoever started it and whenever."""
    ends = int(order.ends.timestamp()) - 60 * MARGIN_MINUTES
    return f'#!/bin/bash\nleft=$(( ({ends} - $(date +%s)) / 60 ))\nshutdown -h "+$(( left > 0 ? left : 0 ))"\n'


def _setup(host: HostConfig, order: Order) -> list[str]:
    """Return the commands that bring code, environment and data to a host, as its boot script does."""
    bundle = shlex.quote(f"s3://{host.bucket}/{host.prefix}/runs/{order.run}/code.bundle")
    here = f"cd {PROJECT} &&"
    return [
        "sudo apt-get update -q && sudo apt-get install -qy git make unzip python3-venv",
        "command -v aws >/dev/null || sudo snap install aws-cli --classic",
        f'sudo install -d -o "$USER" {ROOT}',
        f"aws s3 cp --only-show-errors --region {host.region} {bundle} {ROOT}/code.bundle",
        f"git init -q {PROJECT}; {here} git fetch -q {ROOT}/code.bundle '+refs/*:refs/remotes/bundle/*'",
        f"{here} git -c advice.detachedHead=false checkout -q {shlex.quote(order.commit)}",
        f"{here} make setup",
        f"{here} AWS_DEFAULT_REGION={host.region} .venv/bin/dvc pull",
    ]


def _through_session_manager(host: HostConfig, order: Order) -> str:
    """Return what stands for an open SSH port: the group lets nobody in from outside."""
    name = f"Name=tag:run,Values={order.run} Name=private-ip-address,Values=%h"
    instance = (
        f"$(aws ec2 describe-instances --region {host.region} --filters {name} "
        "--query 'Reservations[0].Instances[0].InstanceId' --output text)"
    )
    start = f"aws ssm start-session --region {host.region} --target {instance}"
    return f'sh -c "{start} --document-name AWS-StartSSHSession --parameters portNumber=%p"'


def prepare(aws: Aws, host: HostConfig, order: Order, vpc: str) -> str:
    """Make what `ray up` expects, role, instance profile and security group, and return the group's id."""
    from botocore.exceptions import ClientError

    make_role(aws, host, order)
    name = name_of(host.project, order.run)
    rights = json.dumps(of_head(aws.account(), host, order))
    with telling("role"):
        aws.client("iam").put_role_policy(RoleName=name, PolicyName="cluster", PolicyDocument=rights)
    group = make_group(aws, host, order, vpc)
    with telling("security group"):
        try:
            aws.client("ec2").authorize_security_group_ingress(
                GroupId=group, IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
            )
        except ClientError as error:
            if code_of(error) != "InvalidPermission.Duplicate":
                raise
    return group


def of_head(account: str, host: HostConfig, order: Order) -> policies.Policy:
    """Return what the head may do besides: start, tag and see hosts of its own run.

    Workers have the same role: whoever runs code on one of a cluster's hosts can run it on the head.
    """
    own = {"aws:ResourceTag/project": host.project, "aws:ResourceTag/run": order.run}
    asked = {"aws:RequestTag/project": host.project, "aws:RequestTag/run": order.run}
    instances, name = "arn:aws:ec2:*:*:instance/*", name_of(host.project, order.run)
    return {
        "Version": "2012-10-17",
        "Statement": [
            _statement("Look", "ec2:Describe*", "*"),
            _statement("RunFrom", "ec2:RunInstances", _PARTS),
            _statement("RunTagged", "ec2:RunInstances", instances, asked),
            _statement("TagNew", "ec2:CreateTags", "*", {"ec2:CreateAction": "RunInstances"}),
            _statement("TagOwn", "ec2:CreateTags", instances, own),
            _statement(
                "Pass",
                "iam:PassRole",
                f"arn:aws:iam::{account}:role{policies.PATH}{name}",
                {"iam:PassedToService": "ec2.amazonaws.com"},
            ),
        ],
    }


_PARTS = [
    f"arn:aws:ec2:*:*:{kind}/*"
    for kind in ("image", "subnet", "security-group", "network-interface", "volume", "key-pair", "snapshot")
]


def of_person(project: str) -> policies.Policy:
    """Return what the person needs besides `policies.of_person` who runs `ray up`."""
    own = {"aws:ResourceTag/project": project}
    return {
        "Version": "2012-10-17",
        "Statement": [
            _statement("WithinGroup", "ec2:AuthorizeSecurityGroupIngress", "*", own),
            _statement("Key", ["ec2:CreateKeyPair", "ec2:ImportKeyPair"], "arn:aws:ec2:*:*:key-pair/ray-*"),
            _statement("RunFrom", "ec2:RunInstances", "arn:aws:ec2:*:*:key-pair/ray-*"),
            _statement("TagOwn", "ec2:CreateTags", "arn:aws:ec2:*:*:instance/*", own),
            _statement(
                "Tunnel", "ssm:StartSession", "arn:aws:ec2:*:*:instance/*", {"ssm:resourceTag/project": project}
            ),
            _statement("TunnelHow", "ssm:StartSession", "arn:aws:ssm:*:*:document/AWS-StartSSHSession"),
        ],
    }


def _statement(
    sid: str, action: str | list[str], resource: str | list[str], equal: Mapping[str, str] | None = None
) -> dict[str, Any]:
    condition = {"Condition": {"StringEquals": dict(equal)}} if equal else {}
    return {"Sid": sid, "Effect": "Allow", "Action": action, "Resource": resource, **condition}
