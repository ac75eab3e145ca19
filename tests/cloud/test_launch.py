"""A launch: what EC2 was asked for, that a retry starts nothing new, and that all of it can be removed."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from renting import ACCOUNT, host_config, option, order

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.launch import launch
from cnn_tuning.cloud.names import as_mapping
from cnn_tuning.cloud.teardown import all_runs, remove
from cnn_tuning.errors import UserError


@pytest.fixture
def started(aws, images):
    host = host_config(**images)
    placed = order()
    return host, placed, launch(aws, host, placed, [option(), option("g6.xlarge")])


def test_a_host_runs_with_its_tags(started, aws):
    host, placed, told = started
    [item] = inventory.instances(aws, host.project, placed.run)
    assert item["InstanceId"] == told.id
    assert told.type in ("g5.xlarge", "g6.xlarge")
    assert not told.found
    tags = as_mapping(item["Tags"])
    assert {"project", "run", "owner", "commit", "expires-at", "budget"} <= set(tags)
    assert datetime.fromisoformat(tags["expires-at"]) == placed.ends.replace(microsecond=0)
    assert tags["budget"] == "2.00"


def test_the_template_keeps_what_was_promised(started, aws):
    host, placed, _ = started
    ec2 = aws.client("ec2")
    name = f"{host.project}_{placed.run}"
    [version] = ec2.describe_launch_template_versions(LaunchTemplateName=name)["LaunchTemplateVersions"]
    data = version["LaunchTemplateData"]
    assert data["MetadataOptions"] == {
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "HttpEndpoint": "enabled",
    }
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    [disk] = data["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"]
    assert (disk["Ebs"]["VolumeType"], disk["Ebs"]["VolumeSize"]) == ("gp3", host.disk_gb)
    assert "KeyName" not in data
    assert {spec["ResourceType"] for spec in data["TagSpecifications"]} >= {"instance", "volume"}
    [group] = ec2.describe_security_groups(GroupIds=data["SecurityGroupIds"])["SecurityGroups"]
    assert group["IpPermissions"] == []
    script = base64.b64decode(data["UserData"]).decode()
    assert script.startswith("#!/bin/bash\nRUN=run-one\n")
    assert "testing-secret" not in script


def test_the_fleet_takes_spot_hosts_of_any_type_and_zone(started, aws):
    [fleet] = aws.client("ec2").describe_fleets()["Fleets"]
    assert fleet["Type"] == "instant"
    assert fleet["SpotOptions"]["AllocationStrategy"] == "price-capacity-optimized"
    assert fleet["TargetCapacitySpecification"]["DefaultTargetCapacityType"] == "spot"
    overrides = fleet["LaunchTemplateConfigs"][0]["Overrides"]
    assert {place["InstanceType"] for place in overrides} == {"g5.xlarge", "g6.xlarge"}
    assert len({place["SubnetId"] for place in overrides}) > 1


def test_a_schedule_ends_the_host_even_if_it_hangs(started, aws):
    host, placed, told = started
    made = aws.client("scheduler").get_schedule(Name=f"{host.project}_{placed.run}")
    assert made["ScheduleExpression"] == f"at({placed.ends.astimezone(UTC):%Y-%m-%dT%H:%M:%S})"
    assert made["ActionAfterCompletion"] == "DELETE"
    assert made["Target"]["Arn"].endswith("ec2:terminateInstances")
    assert json.loads(made["Target"]["Input"]) == {"InstanceIds": [told.id]}
    role = aws.client("iam").get_role(RoleName=f"{host.project}_{placed.run}.guard")["Role"]
    assert made["Target"]["RoleArn"] == role["Arn"]
    [statement] = role["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Principal"] == {"Service": "scheduler.amazonaws.com"}
    assert statement["Condition"]["StringEquals"] == {"aws:SourceAccount": ACCOUNT}


def test_the_host_may_touch_its_prefix_and_end_itself_and_no_more(started, aws):
    host, placed, _ = started
    name = f"{host.project}_{placed.run}"
    rights = aws.client("iam").get_role_policy(RoleName=name, PolicyName="rights")["PolicyDocument"]
    by_sid = {statement["Sid"]: statement for statement in rights["Statement"]}
    assert by_sid["Objects"]["Resource"] == f"arn:aws:s3:::a-bucket/{host.prefix}/*"
    assert by_sid["EndThisRun"]["Condition"]["StringEquals"]["aws:ResourceTag/run"] == placed.run
    others = [s for s in rights["Statement"] if s["Sid"] not in ("SessionManager",)]
    assert all(s["Resource"] != "*" for s in others)


def test_a_retry_finds_the_host_and_starts_none(started, aws):
    host, placed, told = started
    again = launch(aws, host, placed, [option()])
    assert (again.id, again.found) == (told.id, True)
    assert len(inventory.instances(aws, host.project)) == 1


def test_a_retry_gives_a_host_without_a_guard_the_one_it_was_to_have(started, aws):
    host, placed, told = started
    scheduler = aws.client("scheduler")
    scheduler.delete_schedule(Name=f"{host.project}_{placed.run}")
    later = order(placed.run, hours=9)
    assert launch(aws, host, later, [option()]).found
    made = scheduler.get_schedule(Name=f"{host.project}_{placed.run}")
    assert made["ScheduleExpression"] == f"at({placed.ends.astimezone(UTC):%Y-%m-%dT%H:%M:%S})"
    assert told.id in made["Target"]["Input"]


def test_removal_leaves_nothing_and_may_be_repeated(started, aws):
    host, placed, told = started
    other = order("run-two")
    launch(aws, host, other, [option()])
    removed = remove(aws, host.project, placed.run)
    assert f"host {told.id}" in removed
    assert {"schedule", "launch template", "security group", "instance profile", "role", "guard's role"} <= set(
        removed
    )
    assert remove(aws, host.project, placed.run) == []
    assert all_runs(aws, host.project) == [other.run]  # another run's are untouched
    remove(aws, host.project, other.run)
    assert all_runs(aws, host.project) == []
    assert inventory.leftovers(aws, host.project) == []


def test_another_projects_things_are_not_seen(started, aws):
    host, _, _ = started
    assert all_runs(aws, host.project[:3]) == []
    assert all_runs(aws, f"{host.project}-b") == []


def test_on_demand_is_asked_for_where_it_is_configured(aws, images):
    host = host_config(**images, market="on-demand")
    told = launch(aws, host, order(), [option()])
    assert told.market == "on-demand"
    [fleet] = aws.client("ec2").describe_fleets()["Fleets"]
    assert fleet["TargetCapacitySpecification"]["DefaultTargetCapacityType"] == "on-demand"


def test_the_cap_on_the_spot_price_reaches_ec2(aws, images):
    launch(aws, host_config(**images, max_price_per_hour=0.5), order(), [option()])
    [fleet] = aws.client("ec2").describe_fleets()["Fleets"]
    assert {place["MaxPrice"] for place in fleet["LaunchTemplateConfigs"][0]["Overrides"]} == {"0.5"}


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"bucket": None}, [option()], "remote init"),
        ({}, [option("p3.2xlarge")], "g5.xlarge instead"),
        ({}, [option(refused="costs too much")], "host plan"),
        ({"gpu_ami": "/absent"}, [option()], "host.gpu_ami"),
        ({"subnets": ("subnet-0a0a0a0a",)}, [option()], "host.subnets"),
    ],
)
def test_what_cannot_start_is_told_in_a_line_and_leaves_nothing(aws, images, changes, options, told):
    host = host_config(**{**images, **changes})
    with pytest.raises(UserError, match=told) as caught:
        launch(aws, host, order(), options)
    assert "\n" not in str(caught.value)
    assert all_runs(aws, host.project) == []


def test_a_run_that_would_be_over_at_once_is_not_started(aws, images):
    late = order(ends=datetime.now(UTC) + timedelta(seconds=30))
    with pytest.raises(UserError, match="end before it starts"):
        launch(aws, host_config(**images), late, [option()])
