"""Row 38: what EC2 refuses is told in one line with its remedy, and nothing is left running or billed."""

from __future__ import annotations

import pytest
from renting import (  # noqa: F401
    ACCOUNT,
    _price_server,
    _shared,
    aws,
    credentials,
    host_config,
    images,
    intercept,
    no_aws,
    option,
    order,
    prices,
)

from cnn_tuning.cloud import inventory
from cnn_tuning.cloud.launch import launch
from cnn_tuning.cloud.teardown import all_runs
from cnn_tuning.errors import UserError


@pytest.fixture
def answered(aws):  # noqa: F811
    """Return a function that lets an operation be answered as a test wants; afterwards moto answers again."""
    stops = []

    def answer(service, operation, answers):
        waiting = iter(answers)
        asked = []

        def handler(params):
            asked.append(params)
            return next(waiting)

        stops.append(intercept(aws.client(service), operation, handler))
        return asked

    yield answer
    for stop in stops:
        stop()


def failed(*codes):
    """Return what CreateFleet answers when no place could give a host: a success without instances."""
    errors = [
        {"ErrorCode": code, "ErrorMessage": f"{code} in account {ACCOUNT}", "Lifecycle": "spot"} for code in codes
    ]
    return {"FleetId": "fleet-1", "Errors": errors, "Instances": []}


def refused(code, message="no"):
    """Return an error of the request itself."""
    return {"Error": {"Code": code, "Message": message}}


CASES = {
    "no capacity": (failed("InsufficientInstanceCapacity", "InsufficientInstanceCapacity", "Unsupported"),
                    "no capacity now: name more types or zones"),
    "spot quota": (failed("MaxSpotInstanceCountExceeded"), "ask for more vCPUs in Service Quotas"),
    "vCPU quota": (refused("VcpuLimitExceeded"), "ask for more vCPUs in Service Quotas"),
    "price above the cap": (failed("SpotMaxPriceTooLow"), "above host.max_price_per_hour: raise it"),
    "bad AMI": (failed("InvalidAMIID.NotFound"), "check host.gpu_ami"),
    "not allowed": (refused("UnauthorizedOperation", f"User: arn:aws:iam::{ACCOUNT}:user/ann is not "
                            "authorized. Encoded authorization failure message: abc"), "remote policies"),
    "no reason": (failed(), "try again"),
    "unknown": (failed("SomethingNew"), "SomethingNew in account"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_38_a_refusal_is_one_line_and_leaves_nothing(aws, images, answered, case):  # noqa: F811
    answer, told = CASES[case]
    answered("ec2", "CreateFleet", [answer])
    host = host_config(**images)
    with pytest.raises(UserError) as caught:
        launch(aws, host, order(), [option()])
    line = str(caught.value)
    assert told in line
    assert "\n" not in line and ACCOUNT not in line and "abc" not in line
    assert all_runs(aws, host.project) == []


def test_38_an_ami_that_is_not_there_is_refused_before_anything_is_made(aws, images):  # noqa: F811
    aws.client("ssm").put_parameter(Name="/gpu", Value="ami-0123456789abcdef0", Type="String", Overwrite=True)
    with pytest.raises(UserError, match=r"AMI .*host\.gpu_ami"):
        launch(aws, host_config(**images), order(), [option()])
    assert all_runs(aws, "cnn-tuning") == []


def test_38_on_demand_takes_over_only_where_it_is_configured(aws, images, answered):  # noqa: F811
    given = {
        "Instances": [
            {"InstanceIds": ["i-0123456789abcdef0"], "InstanceType": "g5.xlarge", "Lifecycle": "on-demand"}
        ]
    }
    asked = answered("ec2", "CreateFleet", [failed("InsufficientInstanceCapacity"), given])
    told = launch(aws, host_config(**images, on_demand_fallback=True), order(), [option()])
    assert told.market == "on-demand"
    markets = [params["body"]["TargetCapacitySpecification.DefaultTargetCapacityType"] for params in asked]
    assert markets == ["spot", "on-demand"]
    assert len({params["body"]["ClientToken"] for params in asked}) == 2


def test_38_a_new_role_is_waited_for(aws, images, answered):  # noqa: F811
    unknown = failed("InvalidParameterValue")
    unknown["Errors"][0]["ErrorMessage"] = "Value (x) for parameter iamInstanceProfile.name is invalid"
    given = {
        "Instances": [{"InstanceIds": ["i-0123456789abcdef0"], "InstanceType": "g5.xlarge", "Lifecycle": "spot"}]
    }
    asked = answered("ec2", "CreateFleet", [unknown, unknown, given])
    assert launch(aws, host_config(**images), order(), [option()]).id == "i-0123456789abcdef0"
    # A token that was spent on a failure would give that failure again.
    assert len({params["body"]["ClientToken"] for params in asked}) == 3


@pytest.mark.parametrize(
    "error", [refused("ServiceQuotaExceededException", "too many schedules"), KeyboardInterrupt]
)
def test_38_a_host_that_cannot_be_guarded_is_ended(aws, images, answered, error):  # noqa: F811
    seen = []

    def fail():
        seen.extend(inventory.instances(aws, "cnn-tuning"))
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        yield error

    answered("scheduler", "CreateSchedule", fail())
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        launch(aws, host_config(**images), order(), [option()])
    if error is not KeyboardInterrupt:
        line = str(caught.value)
        assert line.startswith("guard: ServiceQuotaExceededException: ") and "\n" not in line
        assert "delete schedules that are not needed, or ask for more in Service Quotas" in line
    assert len(seen) == 1  # it did run
    assert all_runs(aws, "cnn-tuning") == []


def test_38_what_cannot_be_removed_is_told_with_the_reason(aws, images, answered):  # noqa: F811
    answered("ec2", "CreateFleet", [failed("InsufficientInstanceCapacity")])
    answered("iam", "DeleteRole", [refused("AccessDenied", "no DeleteRole for you")] * 2)
    with pytest.raises(UserError, match=r"no capacity.*not all could be removed.*host down run-one.*DeleteRole"):
        launch(aws, host_config(**images), order(), [option()])
    assert {item.kind for item in inventory.leftovers(aws, "cnn-tuning")} == {"role"}
