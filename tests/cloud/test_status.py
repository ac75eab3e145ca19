"""`host status`, `down`, `cost` and `plan` as commands: everything tagged is found, told, and removed."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from renting import ACCOUNT, host_config, option, order

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.aws import hide_account
from cnn_tuning.cloud.launch import launch
from cnn_tuning.cloud.names import as_list
from cnn_tuning.cloud.plan import extras_per_hour


@pytest.fixture
def host(images):
    return host_config(**images)


def test_nothing_there_costs_nothing(aws, folder, command):
    done = command("host", "status")
    assert done.exit_code == 0
    assert done.output == "nothing of project cnn-tuning costs money in us-east-1\n"


def test_a_host_is_told_with_its_price_and_end(aws, host, folder, command):
    placed = order("told-run")
    started = launch(aws, host_config(**{**host.__dict__, "market": "on-demand"}), placed, [option()])
    done = command("host", "status", "--json")
    [row] = [row for row in json.loads(done.output)["costs"] if row["kind"] == "host"]
    assert (row["id"], row["run"], row["warnings"]) == (started.id, "told-run", [])
    assert row["per_hour"] == pytest.approx(1.006)
    assert done.exit_code == 0
    shown = command("host", "status").output
    assert "told-run" in shown and "ann" in shown and started.id in shown
    assert ACCOUNT not in shown + done.output


def test_what_was_forgotten_is_warned_of(aws, host, folder, command, monkeypatch):
    placed = order("forgotten")
    launch(aws, host, placed, [option()])
    aws.client("scheduler").delete_schedule(Name="cnn-tuning_forgotten")
    ec2 = aws.client("ec2")
    tags = as_list({"project": "cnn-tuning", "run": "old-run"})
    ec2.create_volume(AvailabilityZone="us-east-1a", Size=100, VolumeType="gp3",
                      TagSpecifications=[{"ResourceType": "volume", "Tags": tags}])  # fmt: skip
    ec2.allocate_address(Domain="vpc", TagSpecifications=[{"ResourceType": "elastic-ip", "Tags": tags}])
    monkeypatch.setattr(inventory, "utc_now", lambda: datetime.now(UTC) + timedelta(hours=3))
    done = command("host", "status")
    assert done.exit_code == 1
    told = done.output
    assert "past its expiry by 2.0 h" in told
    assert "no schedule will end it" in told
    assert told.count("belongs to no host") == 2
    assert "100 GB gp3" in told and "Elastic IP" in told


def test_down_removes_one_run_or_all_and_may_be_repeated(aws, host, folder, command):
    for run in ("run-one", "run-two"):
        launch(aws, host, order(run), [option()])
    tags = as_list({"project": "cnn-tuning", "run": "old-run"})
    aws.client("ec2").create_volume(AvailabilityZone="us-east-1a", Size=9,
                                    TagSpecifications=[{"ResourceType": "volume", "Tags": tags}])  # fmt: skip
    first = command("host", "down", "run-one")
    assert first.exit_code == 0
    assert "run-one: host i-" in first.output and "role" in first.output
    assert command("host", "down", "run-one").output == "run-one: nothing was left\n"
    assert {item["State"]["Name"] for item in inventory.instances(aws, "cnn-tuning")} == {"running"}
    every = command("host", "down", "--all")
    assert every.exit_code == 0
    assert "run-two: host" in every.output and "old-run: volume" in every.output
    assert command("host", "status").output.startswith("nothing of project")
    assert inventory.leftovers(aws, "cnn-tuning") == []


def test_an_endpoint_costs_until_it_is_removed_also_when_no_host_is_left(aws, folder, command):
    sagemaker, made = aws.client("sagemaker"), {"Tags": as_list({"project": "cnn-tuning"})}
    image = {"Image": f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/mnist:3"}
    role = f"arn:aws:iam::{ACCOUNT}:role/r"
    sagemaker.create_model(ModelName="m", PrimaryContainer=image, ExecutionRoleArn=role)
    variant = {"VariantName": "v", "ModelName": "m", "InstanceType": "ml.c5.large", "InitialInstanceCount": 2}
    sagemaker.create_endpoint_config(EndpointConfigName="c", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="mine", EndpointConfigName="c", **made)
    sagemaker.create_endpoint(EndpointName="of-others", EndpointConfigName="c")
    for arguments in (("status",), ("down", "--all")):
        told = command("host", *arguments).output
        assert "endpoint mine (2 × ml.c5.large" in told
        assert "still costs: cnn-tuning deploy down serving.endpoint.name=mine" in told
        assert "nothing of project" not in told and "of-others" not in told
    [row] = json.loads(command("host", "status", "--json").output)["endpoints"]
    assert row["name"] == "mine"
    sagemaker.delete_endpoint(EndpointName="mine")
    assert command("host", "status").output.startswith("nothing of project")


def test_a_leftover_that_costs_nothing_is_named(aws, host, folder, command):
    launch(aws, host, order(), [option()])
    aws.client("ec2").terminate_instances(
        InstanceIds=[i["InstanceId"] for i in inventory.instances(aws, host.project)]
    )
    done = command("host", "status")
    assert done.exit_code == 1
    assert "left over of run run-one: role cnn-tuning_run-one" in done.output


def test_what_hosts_cost_is_kept_when_they_are_gone(aws, host, folder, command):
    launch(aws, host_config(**{**host.__dict__, "market": "on-demand"}), order(), [option()])
    command("host", "down", "run-one")
    [bill] = json.loads(command("host", "cost", "--json").output)["hosts"]
    assert bill["run"] == "run-one" and bill["ended"] and bill["usd"] >= 0
    assert "for 1 hosts" in command("host", "cost").output


def test_a_bill_of_down_holds_disk_and_address_as_those_of_runs_do(aws, host, folder, command, monkeypatch):
    placed = host_config(**{**host.__dict__, "market": "on-demand"})
    launch(aws, placed, order(), [option()])
    monkeypatch.setattr(inventory, "utc_now", lambda: datetime.now(UTC) + timedelta(hours=1))
    command("host", "down", "run-one")
    [bill] = json.loads(command("host", "cost", "--json").output)["hosts"]
    assert bill["usd"] == pytest.approx(bill["hours"] * (1.006 + extras_per_hour(placed)))


def test_down_must_be_told_what(aws, folder, command):
    for arguments in ((), ("run-one", "--all"), ("../x",)):
        done = command("host", "down", *arguments)
        assert done.exit_code == 1 and "error: " in done.output


def test_without_credentials_there_is_one_line(no_aws, folder, command):
    for arguments in (("status",), ("down", "--all")):
        done = command("host", *arguments)
        assert done.exit_code == 1
        assert "no AWS credentials were found: run `aws configure`" in done.output
    assert "only what was ended from here" in command("host", "cost").output


def test_a_plan_needs_no_credentials(no_aws, folder, command):
    (folder / "params.yaml").write_text("experiment: mnist\nsearch: none\nablation: none\n")
    done = command("host", "plan", "data.limit=60000")
    assert done.exit_code == 0, done.output
    assert "mnist: 55,000 training images × 6 epochs" in done.output
    assert "prices and quotas unknown: no AWS credentials were found" in done.output
    assert "refused: p3.2xlarge: V100" in done.output
    assert "From the calibration table, not from a run" in done.output
    assert "A10G" in done.output


def test_a_plan_with_prices_names_dollars_and_zones(aws, folder, command):
    shape = ("data.limit=60000", "ablation=none", "search=none")
    done = command("host", "plan", "--json", "--measured", "g5.xlarge=61000", *shape)
    told = json.loads(done.output)
    options = {found["type"]: found for found in told["options"]}
    assert told["epochs"] == 6
    g5 = options["g5.xlarge"]
    assert (g5["basis"], g5["quota_ok"]) == ("measured", True)
    assert g5["usd_on_demand"] == pytest.approx(g5["hours"] * 1.02, rel=0.01)
    assert len(g5["usd_spot"]) > 1
    assert options["g6e.xlarge"]["on_demand_per_hour"] is None
    assert any("on-demand price unknown in us-east-1: g6e.xlarge" in note for note in told["notes"])


def test_a_plan_counts_ablations_and_searches(no_aws, folder, command):
    def epochs(*overrides):
        done = command("host", "plan", "--json", "data.limit=60000", *overrides)
        return json.loads(done.output)["epochs"]

    alone = epochs("ablation=none", "search=none")
    assert epochs("search=none") == alone + 2 * 3  # two arms, three seeds, one epoch each
    assert epochs("ablation=none", "search=quick", "search.budget.trials=5") > alone + 5


def test_a_plan_before_there_is_data_says_what_is_missing(no_aws, folder, command):
    done = command("host", "plan", "search=none")
    assert done.exit_code == 0
    assert "unknown number of training images" in done.output and "dvc repro preprocess" in done.output


def widest_row(output):
    return max(len(line.rstrip()) for line in output.splitlines() if "  " in line)


def test_a_plan_before_there_is_data_has_prices_per_hour_and_ranks_by_them(aws, spot, folder, command):
    done = command("host", "plan", "search=none", "host.candidates=[g5.xlarge,g6.xlarge,g4dn.xlarge]")
    assert done.exit_code == 0, done.output
    assert "hours  " not in done.output and "in all  " not in done.output
    ranked = [line.split() for line in done.output.splitlines() if re.match(r"\w+\.xlarge .* ok", line)]
    assert [(row[0], *row[-3:-1]) for row in ranked] == [
        ("g4dn.xlarge", "0.526", "0.190"),
        ("g6.xlarge", "0.805", "0.300"),
        ("g5.xlarge", "1.006", "0.400"),
    ]
    assert re.search(r"spot \$ an hour +us-east-1a +us-east-1b *\n", done.output)
    assert re.search(r"g4dn\.xlarge +0\.210 +0\.190 *\n", done.output)
    assert re.search(r"g6\.xlarge +- +0\.300 *\n", done.output)
    assert widest_row(done.output) <= 110
    told = command(
        "host", "plan", "search=none", "host=on_demand", "--json", "host.candidates=[g5.xlarge,g6.xlarge]"
    )
    assert [found["type"] for found in json.loads(told.output)["options"]] == ["g6.xlarge", "g5.xlarge"]


def test_a_plan_of_known_length_has_prices_per_hour_and_in_all(aws, spot, folder, command):
    shape = ("data.limit=60000", "ablation=none", "search=none", "host.candidates=[g5.xlarge]")
    done = command("host", "plan", "--measured", "g5.xlarge=61000", *shape)
    [row] = [line.split() for line in done.output.splitlines() if re.match(r"g5\.xlarge .* ok", line)]
    per_hour, hours, in_all = row[-6:-4], float(row[-4]), [float(value) for value in row[-3:-1]]
    assert per_hour == ["1.006", "0.400"]
    extras = extras_per_hour(host_config())
    assert in_all == pytest.approx([hours * (1.006 + extras), hours * (0.4 + extras)], abs=0.01)
    assert widest_row(done.output) <= 110


def test_a_speed_that_is_none_is_told(no_aws, folder, command):
    done = command("host", "plan", "--measured", "g5.xlarge", "data.limit=60000")
    assert "must be like g5.xlarge=61000" in done.output


@pytest.mark.parametrize("around", ["arn:aws:iam::{}:role/x", "sagemaker-us-east-1-{}", "{}.dkr.ecr", "{}, {}"])
def test_an_account_number_is_hidden_wherever_it_stands(around):
    assert ACCOUNT not in hide_account(around.format(ACCOUNT, ACCOUNT))


@pytest.mark.parametrize("other", [f"12345678-1234-1234-1234-{ACCOUNT}", f"0{ACCOUNT}", f"{ACCOUNT}a"])
def test_what_only_looks_like_an_account_number_is_left(other):
    assert hide_account(other) == other
