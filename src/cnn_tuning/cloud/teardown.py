"""Remove what belongs to a run, as often as one likes: the host first, then what it was made of.

A step that fails does not keep the others from being done; what is left is told at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.aws import Aws, code_of, telling
from cnn_tuning.cloud.names import GUARD, name_of
from cnn_tuning.errors import UserError

PAUSE_S = 5.0
ATTEMPTS = 24
_GONE = {"NoSuchEntity", "ResourceNotFoundException", "InvalidGroup.NotFound", "InvalidGroupId.NotFound",
         "InvalidLaunchTemplateName.NotFoundException", "InvalidLaunchTemplateId.NotFound",
         "InvalidLaunchTemplateName.NotFound", "InvalidVolume.NotFound", "InvalidAllocationID.NotFound",
         "InvalidInstanceID.NotFound"}  # fmt: skip


def all_runs(aws: Aws, project: str) -> list[str]:
    """Return every run of which anything exists."""
    things = [
        *inventory.instances(aws, project),
        *inventory.volumes(aws, project),
        *inventory.addresses(aws, project),
    ]
    tagged = {tag["Value"] for item in things for tag in item.get("Tags", []) if tag["Key"] == "run"}
    return sorted(tagged | {item.run for item in inventory.leftovers(aws, project)})


def end_hosts(aws: Aws, project: str, run: str | None = None, *, wait: bool = True) -> list[str]:
    """Terminate the hosts of a run, or of all runs, wait until they are gone, and return their ids."""
    ids = [item["InstanceId"] for item in inventory.instances(aws, project, run)]
    if ids:
        ec2 = aws.client("ec2")
        with telling("ending hosts"):
            ec2.terminate_instances(InstanceIds=ids)
            if not wait:
                return ids
            ec2.get_waiter("instance_terminated").wait(
                InstanceIds=ids, WaiterConfig={"Delay": PAUSE_S, "MaxAttempts": 120}
            )
    return ids


def remove(aws: Aws, project: str, run: str) -> list[str]:
    """Remove everything of a run; return what was there, in words.

    Raises:
        UserError: names each thing that could not be removed. Doing it again goes on.
    """
    removed: list[str] = []
    problems: list[str] = []
    try:
        removed += [f"host {id_}" for id_ in end_hosts(aws, project, run)]
    except UserError as error:
        problems.append(str(error))
    for what, act in _steps(aws, project, run, problems):
        try:
            if act():
                removed.append(what)
        except UserError as error:
            problems.append(str(error))
    if problems:
        again = f"run {run}: not all could be removed, try `cnn-tuning host down {run}` again"
        raise UserError(f"{again}: {'; '.join(problems)}")
    return removed


def renew(aws: Aws, project: str, run: str) -> None:
    """End what still runs of a run and remove what is made anew for its next host: schedule and template."""
    end_hosts(aws, project, run)
    ec2 = aws.client("ec2")
    _gone("schedule", aws.client("scheduler").delete_schedule, Name=name_of(project, run))
    for id_ in _templates(ec2, project, run):
        _gone("launch template", ec2.delete_launch_template, LaunchTemplateId=id_)


def _steps(aws: Aws, project: str, run: str, problems: list[str]) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield what to remove once the host is gone, in this order, and how; look-ups that fail are told."""
    name = name_of(project, run)
    ec2, iam = aws.client("ec2"), aws.client("iam")
    yield "schedule", partial(_gone, "schedule", aws.client("scheduler").delete_schedule, Name=name)
    for item in _listed(problems, inventory.addresses, aws, project, run):
        id_ = item["AllocationId"]
        yield f"address {id_}", partial(_gone, "address", ec2.release_address, AllocationId=id_)
    for item in _listed(problems, inventory.volumes, aws, project, run):
        id_ = item["VolumeId"]
        yield f"volume {id_}", partial(_gone, "volume", ec2.delete_volume, VolumeId=id_)
    for id_ in _listed(problems, _templates, ec2, project, run):
        delete = partial(ec2.delete_launch_template, LaunchTemplateId=id_)
        yield "launch template", partial(_gone, "launch template", delete)
    for group in _listed(problems, _groups, ec2, project, run):
        yield "security group", partial(_gone, "security group", ec2.delete_security_group, GroupId=group)
    yield "instance profile", partial(_remove_profile, iam, name)
    yield "role", partial(_remove_role, iam, name)
    yield "guard's role", partial(_remove_role, iam, name + GUARD)


def _listed(problems: list[str], ask: Callable[..., list], *arguments: Any) -> list:
    try:
        return ask(*arguments)
    except UserError as error:
        problems.append(str(error))
        return []


def _templates(ec2: Any, project: str, run: str) -> list[str]:
    with telling("looking for launch templates"):
        pages = ec2.get_paginator("describe_launch_templates").paginate(Filters=inventory.by_tag(project, run))
        return [item["LaunchTemplateId"] for page in pages for item in page["LaunchTemplates"]]


def _groups(ec2: Any, project: str, run: str) -> list[str]:
    with telling("looking for security groups"):
        pages = ec2.get_paginator("describe_security_groups").paginate(Filters=inventory.by_tag(project, run))
        return [item["GroupId"] for page in pages for item in page["SecurityGroups"]]


def _gone(what: str, delete: Callable[..., Any], **arguments: Any) -> bool:
    """Delete one thing; return whether it was there. One that is still in use is waited for."""
    from botocore.exceptions import ClientError

    with telling(f"removing the {what}"):
        for left in reversed(range(ATTEMPTS)):
            try:
                delete(**arguments)
                return True
            except ClientError as error:
                if code_of(error) in _GONE:
                    return False
                # Network interfaces and volumes outlive the instance by some seconds.
                if code_of(error) not in ("DependencyViolation", "VolumeInUse", "DeleteConflict") or not left:
                    raise
            time.sleep(PAUSE_S)
    return False


def _remove_profile(iam: Any, name: str) -> bool:
    _gone("instance profile", iam.remove_role_from_instance_profile, InstanceProfileName=name, RoleName=name)
    return _gone("instance profile", iam.delete_instance_profile, InstanceProfileName=name)


def _remove_role(iam: Any, name: str) -> bool:
    from botocore.exceptions import ClientError

    with telling("removing the role"):
        try:
            policies = iam.list_role_policies(RoleName=name)["PolicyNames"]
        except ClientError as error:
            if code_of(error) in _GONE:
                return False
            raise
    for policy in policies:
        _gone("role's policy", iam.delete_role_policy, RoleName=name, PolicyName=policy)
    return _gone("role", iam.delete_role, RoleName=name)
