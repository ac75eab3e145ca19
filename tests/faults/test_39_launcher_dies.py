"""Row 39: the laptop dies after the launch. The next `status` finds the host, `down` leaves nothing.

That the host ends by itself is shown by tests/cloud/test_boot.py.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys

import pytest
from moto_server import serving
from renting import (  # noqa: F401
    REGION,
    ROOT,
    command,
    credentials,
    folder,
    host_config,
    leave_nothing,
    no_aws,
    option,
    order,
)

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.launch import launch
from cnn_tuning.cloud.teardown import all_runs

# Launches for real, and is killed at the moment when it asks for the guard.
LAUNCHER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from renting import REGION, host_config, option, order
from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.launch import launch
aws = Aws(REGION)
aws.client("scheduler").meta.events.register(
    "before-call.scheduler.CreateSchedule", lambda **_: os.kill(os.getpid(), signal.SIGKILL)
)
launch(aws, host_config(gpu_ami="/gpu", cpu_ami="/cpu"), order(), [option()])
"""


@pytest.fixture
def server(credentials, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    with serving() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield


@pytest.fixture
def aws(server):
    made = Aws(REGION)
    ami = made.client("ec2").register_image(Name="ubuntu", RootDeviceName="/dev/sda1")["ImageId"]
    made.client("ssm").put_parameter(Name="/gpu", Value=ami, Type="String")
    return made


def test_39_a_launcher_that_is_killed_leaves_nothing_hidden(aws, folder, command):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(ROOT / "tests")],
        env=dict(os.environ),
        cwd=folder,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    [item] = inventory.instances(aws, "cnn-tuning")
    assert item["State"]["Name"] == "running"  # the fault is real: it runs and nothing watches it
    user_data = aws.client("ec2").describe_instance_attribute(InstanceId=item["InstanceId"], Attribute="userData")
    script = base64.b64decode(user_data["UserData"]["Value"]).decode()
    assert 'shutdown -h "+$LIFETIME_MINUTES"' in script  # but it ends itself
    [template] = aws.client("ec2").describe_launch_templates()["LaunchTemplates"]
    [version] = aws.client("ec2").describe_launch_template_versions(LaunchTemplateId=template["LaunchTemplateId"])[
        "LaunchTemplateVersions"
    ]
    assert version["LaunchTemplateData"]["InstanceInitiatedShutdownBehavior"] == "terminate"

    found = command("host", "status")
    assert found.exit_code == 1
    assert item["InstanceId"] in found.output
    assert "no schedule will end it: cnn-tuning host down run-one" in found.output

    again = launch(aws, host_config(gpu_ami="/gpu", cpu_ami="/cpu"), order(), [option()])
    assert (again.id, again.found) == (item["InstanceId"], True)
    assert "no schedule" not in command("host", "status").output

    down = command("host", "down", "--all")
    assert down.exit_code == 0, down.output
    assert inventory.instances(aws, "cnn-tuning") == []
    assert inventory.leftovers(aws, "cnn-tuning") == []
    assert command("host", "status").output.startswith("nothing of project")
    assert all_runs(aws, "cnn-tuning") == []
    leave_nothing(aws)  # which asks EC2, IAM and the scheduler themselves
