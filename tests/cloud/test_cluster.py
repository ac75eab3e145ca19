"""`host cluster`: what `ray up` is told is valid to Ray, guarded as single hosts are, and found again by tag."""

from __future__ import annotations

import json
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from renting import host_config, order

from cnn_tuning.cloud import inventory, teardown
from cnn_tuning.cloud.cluster import Kind, cluster_config, of_head, of_person
from cnn_tuning.cloud.launch import resolve_image
from cnn_tuning.cloud.names import as_mapping

HEAD = Kind("c7i.xlarge", "ami-head", "/dev/sda1", ("subnet-1",))
WORKER = Kind("g5.xlarge", "ami-gpu", "/dev/sda1", ("subnet-1", "subnet-2"))


def config(**changes):
    wanted = order("run-one")
    return cluster_config(
        host_config(**changes), wanted, head=HEAD, worker=WORKER, workers=3, group="sg-1", token=Path("/t/token")
    )


def nodes(made):
    return {name: kind["node_config"] for name, kind in made["available_node_types"].items()}


def test_it_is_valid_to_ray():
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(json.loads(json.dumps(config())))
    util.validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert prepared["setup_commands"] == config()["setup_commands"]
    assert not [line for line in prepared["head_setup_commands"] if "pip install" in line]
    assert prepared["available_node_types"]["worker"]["max_workers"] == prepared["max_workers"] == 3


def test_every_host_has_the_guards_of_a_single_one():
    for node in nodes(config()).values():
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert node["SecurityGroupIds"] == ["sg-1"]
        assert node["IamInstanceProfile"] == {"Name": "cnn-tuning_run-one"}
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"] == {
            "Encrypted": True,
            "DeleteOnTermination": True,
            "VolumeType": "gp3",
            "VolumeSize": 75,
        }
        tagged = {spec["ResourceType"]: as_mapping(spec["Tags"]) for spec in node["TagSpecifications"]}
        assert set(tagged) == {"instance", "volume"}
        for tags in tagged.values():
            assert (tags["project"], tags["run"]) == ("cnn-tuning", "run-one")
            assert datetime.fromisoformat(tags["expires-at"]) > datetime.now(UTC)


def test_a_host_that_starts_late_ends_with_the_others(tmp_path):
    ends = order("run-one").ends
    found = {re.search(r"\(\((?: *\()(\d+) - ", node["UserData"])[1] for node in nodes(config()).values()}
    (seconds,) = map(int, found)
    assert timedelta(0) < ends - datetime.fromtimestamp(seconds, UTC) < timedelta(minutes=5)


def test_workers_are_on_spot_and_the_head_is_not():
    made = nodes(config(max_price_per_hour=0.4))
    assert made["worker"]["InstanceMarketOptions"] == {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.4"}}
    assert "InstanceMarketOptions" not in made["head"]
    assert "InstanceMarketOptions" not in nodes(config(market="on-demand"))["worker"]


def test_trials_go_to_workers_only_and_idle_ones_end():
    made = config(idle_minutes=7)
    kinds = made["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["worker"]["resources"] == {"CPU": 4, "GPU": 1}
    assert (kinds["worker"]["min_workers"], made["idle_timeout_minutes"]) == (0, 7)
    assert made["provider"]["cache_stopped_nodes"] is False


def test_ray_starts_with_token_authentication_on_every_host():
    made = config()
    assert made["file_mounts"] == {"~/.ray/auth_token": "/t/token"}
    for commands in (made["head_start_ray_commands"], made["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command for command in commands)
    assert "--dashboard-host=127.0.0.1" in made["head_start_ray_commands"][1]


def test_the_head_may_start_hosts_of_its_run_only():
    rights = {s["Sid"]: s for s in of_head("123456789012", host_config(), order("run-one"))["Statement"]}
    assert rights["RunTagged"]["Condition"]["StringEquals"] == {
        "aws:RequestTag/project": "cnn-tuning",
        "aws:RequestTag/run": "run-one",
    }
    assert rights["Pass"]["Resource"] == "arn:aws:iam::123456789012:role/cnn-tuning/cnn-tuning_run-one"
    everywhere = [s["Sid"] for s in rights.values() if s["Resource"] == "*" and "Condition" not in s]
    assert everywhere == ["Look"]
    assert all("Condition" in s or s["Resource"] != "*" for s in of_person("cnn-tuning")["Statement"])


@pytest.fixture
def written(aws, project, command):
    """Return what the command printed, and the configuration that it wrote."""
    aws.client("s3").create_bucket(Bucket="a-bucket")
    other = aws.client("ec2").register_image(Name="plain", RootDeviceName="/dev/sda1")["ImageId"]
    aws.client("ssm").put_parameter(Name="/cpu", Value=other, Type="String", Overwrite=True)
    done = command(
        "host", "cluster", "--workers", "3", "--head", "c7i.2xlarge", "--run", "swarm", "host.budget=20"
    )
    assert done.exit_code == 0, done.output
    return done.output, yaml.safe_load((project / ".state/clusters/swarm.yaml").read_text())


def test_the_command_makes_what_ray_up_expects(aws, project, written):
    printed, made = written
    assert "head c7i.2xlarge on demand, up to 3 × g5.xlarge spot" in printed
    assert "cnn-tuning host down swarm" in printed
    token = project / ".state/clusters/swarm.token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() not in printed
    assert token.read_text() not in (project / ".state/clusters/swarm.yaml").read_text()
    assert made["file_mounts"]["~/.ray/auth_token"] == str(token)
    (group,) = nodes(made)["worker"]["SecurityGroupIds"]
    (found,) = aws.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    (rule,) = found["IpPermissions"]
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group]
    assert not rule["IpRanges"]
    profile = nodes(made)["head"]["IamInstanceProfile"]["Name"]
    (role,) = aws.client("iam").get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
    assert sorted(aws.client("iam").list_role_policies(RoleName=role["RoleName"])["PolicyNames"]) == [
        "cluster",
        "rights",
    ]
    assert aws.client("s3").head_object(Bucket="a-bucket", Key="cnn-tuning/runs/swarm/code.bundle")


def test_the_images_are_those_of_single_hosts(aws, images, written):
    host = host_config(**images)
    written_images = {name: node["ImageId"] for name, node in nodes(written[1]).items()}
    assert written_images == {
        "head": resolve_image(aws, host, "c7i.2xlarge"),
        "worker": resolve_image(aws, host, "g5.xlarge"),
    }
    assert written_images["head"] != written_images["worker"]


def test_hosts_of_it_are_found_and_ended_by_tag(aws, written):
    for kind, node in nodes(written[1]).items():
        subnets = node.pop("SubnetIds")
        node.pop("InstanceMarketOptions", None)
        aws.client("ec2").run_instances(
            **node, SubnetId=subnets[0], **dict.fromkeys(("MinCount", "MaxCount"), 2 if kind == "worker" else 1)
        )
    assert len(inventory.instances(aws, "cnn-tuning", "swarm")) == 3
    assert teardown.all_runs(aws, "cnn-tuning") == ["swarm"]
    teardown.remove(aws, "cnn-tuning", "swarm")
    assert not inventory.instances(aws, "cnn-tuning")
    assert not inventory.leftovers(aws, "cnn-tuning")


def test_no_budget_for_a_minute_of_it_is_refused(aws, project, command):
    done = command("host", "cluster", "--workers", "40", "--head", "c7i.2xlarge", "host.budget=0.01")
    assert "does not pay for a minute" in done.output
    assert not inventory.leftovers(aws, "cnn-tuning")


def test_nothing_is_left_where_the_code_cannot_be_brought_there(aws, project, command):
    done = command(
        "host", "cluster", "--head", "c7i.2xlarge", "--run", "swarm", "host.budget=20"
    )  # there is no bucket
    assert done.exit_code
    assert "bucket a-bucket" in done.output
    assert not inventory.leftovers(aws, "cnn-tuning")
    assert not list((project / ".state/clusters").glob("*"))
