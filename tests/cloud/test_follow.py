"""`host run` to its end: progress, replacements, Ctrl-C, going on, and nothing left that costs."""

from __future__ import annotations

import base64
import json
import sys
from datetime import datetime, timedelta
from urllib.parse import parse_qs

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from played_host import LOCK, RUN, ends_well, spooled
from renting import ACCOUNT, intercept

from cnn_tuning.cloud import follow, inventory
from cnn_tuning.cloud.names import as_mapping
from cnn_tuning.cloud.teardown import all_runs
from cnn_tuning.stages import host_follow

START = ("host", "run", "--yes", "--run", RUN)


def user_data(aws, id_):
    answer = aws.client("ec2").describe_instance_attribute(InstanceId=id_, Attribute="userData")
    return base64.b64decode(answer["UserData"]["Value"]).decode()


def bills(command):
    return json.loads(command("host", "cost", "--json").output)["hosts"]


def assert_nothing_is_left(aws):
    assert all_runs(aws, "cnn-tuning") == []
    assert inventory.leftovers(aws, "cnn-tuning") == []


def test_a_run_is_followed_to_its_results_and_back_to_no_cost(
    aws, project, command, played, store_db, rows, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_db}")
    done_at = {"event": "metrics", "step": 0, "values": {"time/seconds": 360.0, "cost/usd": 0.0}}
    loss = {"event": "metrics", "step": 1, "values": {"train/loss": 0.5}}
    end = {"event": "finish", "status": "FINISHED", "error": ""}
    played.put("spool/one.jsonl", spooled("one", [loss, done_at, end]))
    played.put("spool/two.jsonl", spooled("two", [loss]))  # its process was cut off
    # Half the price, as one of two arms side by side; the host knew it.
    shared = {"event": "metrics", "step": 0, "values": {"time/seconds": 360.0, "cost/usd": 0.0005}}
    played.put("spool/three.jsonl", spooled("three", [shared, end], price_per_hour=0.005))
    played.put("spool/one.delivery.json", "{}")
    played.plays(*ends_well(played))
    done = command(*START)
    assert done.exit_code == 0, done.output
    assert "train: epoch 2 of 8" in done.output and ACCOUNT not in done.output
    assert (project / "dvc.lock").read_text() == LOCK
    assert (project / "params.lock.yaml").read_text() == "experiment: mnist\n"
    states = {row[0] for row in rows(store_db, "select status from runs")}
    assert states == {"FINISHED", "KILLED"}
    costs = rows(store_db, "select value from metrics where key = 'cost/usd' and value > 0")
    assert max(row[0] for row in costs) == pytest.approx(
        0.1 * bills(command)[0]["usd"] / bills(command)[0]["hours"], rel=0.01
    )
    assert {0.0005} <= {row[0] for row in costs}
    prices = rows(store_db, "select value from tags where key = 'cnn_tuning.price_per_hour'")
    assert ("0.0050",) in prices
    assert_nothing_is_left(aws)
    [bill] = bills(command)
    assert bill["hours"] == pytest.approx(0.1, abs=0.01) and bill["ended"]
    assert f"cost: ${bill['usd']:.3f} of $2.00" in done.output


@pytest.mark.parametrize("taken", ["interrupted", "vanished"])
def test_a_host_that_is_taken_away_is_replaced_within_the_budget(aws, project, command, played, taken):
    hosts = []
    last = played.tells("interrupted", 75, "train") if taken == "interrupted" else played.gone()
    played.plays(
        played.tells("started"),
        played.at_once(played.waits(minutes=30), lambda: hosts.append(played.instance), last),
        lambda: hosts.append(played.instance),
        *ends_well(played),
    )
    done = command(*START, "host.budget=1", "host.max_hours=2")
    assert done.exit_code == 0, done.output
    first, second = hosts
    assert first["InstanceId"] != second["InstanceId"]
    assert "ATTEMPT=0\n" in user_data(aws, first["InstanceId"])
    assert "ATTEMPT=1\n" in user_data(aws, second["InstanceId"])
    ends = [datetime.fromisoformat(as_mapping(host["Tags"])["expires-at"]) for host in hosts]
    # 30 minutes at spot prices are spent: less than a dollar's worth is left, from half an hour later.
    assert ends[0] < ends[1]
    assert len(bills(command)) == 2 and "on 2 hosts" in done.output
    assert "replacing it (1 of at most 3)" in done.output
    assert_nothing_is_left(aws)


def test_a_host_that_somebody_ended_is_not_replaced(aws, project, command, played):
    played.plays(played.tells("started"), played.gone("Client.UserInitiatedShutdown"))
    done = command(*START)
    assert done.exit_code == 1
    assert "ended by hand or by its schedule" in done.output and f"--run {RUN}" in done.output
    assert_nothing_is_left(aws)


def test_replacements_are_counted(aws, project, command, played):
    played.plays(played.gone(), played.gone())
    done = command(*START, "host.max_replacements=1")
    assert done.exit_code == 1
    assert "1 hosts were replaced already" in done.output and "go on:" in done.output
    assert "cost: $" in done.output
    assert_nothing_is_left(aws)


def test_too_little_left_for_another_host_is_told(aws, project, command, played):
    played.plays(played.at_once(played.waits(minutes=55), played.gone()))
    done = command(*START, "host.max_hours=1")
    assert done.exit_code == 1
    assert "are left of the run, too little for another host" in done.output
    assert_nothing_is_left(aws)


def test_ctrl_c_leaves_the_host_at_work_and_the_run_can_be_gone_on_with(aws, project, command, played):
    def interrupt():
        raise KeyboardInterrupt

    played.plays(played.tells("started"), interrupt)
    done = command(*START)
    assert done.exit_code == 130
    assert f"host run --run {RUN}" in done.output
    one = played.instance["InstanceId"]
    played.plays(*ends_well(played))
    again = command("host", "run", "--run", RUN)  # asks nothing: it starts nothing
    assert again.exit_code == 0, again.output
    assert f"host {one} runs" in again.output
    assert (project / "dvc.lock").read_text() == LOCK
    assert_nothing_is_left(aws)


def test_a_run_that_finished_unwatched_is_brought_home(aws, project, command, played):
    assert command(*START, "--detach").exit_code == 0
    for step in ends_well(played):
        step()
    played.gone("Client.InstanceInitiatedShutdown")()
    done = command("host", "run", "--run", RUN)
    assert done.exit_code == 0, done.output
    assert (project / "dvc.lock").read_text() == LOCK
    assert_nothing_is_left(aws)
    assert len(bills(command)) == 1


def test_a_host_that_ended_by_itself_is_in_the_costs(aws, project, command, played):
    command(*START, "--detach")
    played.waits(minutes=12)()
    played.tells("idle", 1)()
    played.gone("Client.InstanceInitiatedShutdown")()
    aws_says_when = bills(command)
    assert [bill["host"] for bill in aws_says_when] == [bill["host"] for bill in bills(command)]
    assert aws_says_when[0]["ended"] and aws_says_when[0]["usd"] > 0


def test_a_dvc_lock_that_was_changed_meanwhile_stays(aws, project, command, played):
    (project / "dvc.lock").write_text("mine: 1\n")
    steps = ends_well(played)
    played.plays(*steps[:-1], lambda: (project / "dvc.lock").write_text("mine: 2\n"), steps[-1])
    # Nothing to push: no stage is in it.
    done = command(*START)
    assert done.exit_code == 1
    assert "has changed here since the launch and stays" in done.output
    assert (project / "dvc.lock").read_text() == "mine: 2\n"
    kept = project / ".state/hosts" / RUN / "dvc.lock"
    assert kept.read_text() == LOCK
    assert_nothing_is_left(aws)
    (project / "dvc.lock").write_bytes(kept.read_bytes())
    assert command("host", "pull", RUN).exit_code == 0


def test_another_experiment_goes_along_and_nothing_changes_here(aws, project, command, played):
    before = (project / "params.yaml").read_text()
    played.plays(*ends_well(played))
    done = command(*START, "--experiment", "mnist_fast")
    assert (project / "params.yaml").read_text() == before
    assert done.exit_code == 0, done.output
    assert "dvc.lock stays as it is: the results are of experiment mnist_fast" in done.output
    assert f"0 files fetched, none named, in .state/hosts/{RUN}/outs" in done.output
    assert not (project / "dvc.lock").exists()
    (project / "params.yaml").write_text(before.replace("experiment: mnist\n", "experiment: mnist_fast\n"))
    taken = command("host", "pull", RUN)
    assert taken.exit_code == 0, taken.output
    assert (project / "dvc.lock").read_text() == LOCK


def test_what_was_pulled_midway_does_not_block_the_end(aws, project, command, played):
    partial = LOCK.replace("md5: x", "md5: y")

    def pull():
        pulled = command("host", "pull", RUN)
        assert pulled.exit_code == 0, pulled.output
        assert (project / "dvc.lock").read_text() == partial

    played.plays(played.tells("started"), played.leaves(dvc__lock=partial), pull, *ends_well(played))
    done = command(*START)
    assert done.exit_code == 0, done.output
    assert (project / "dvc.lock").read_text() == LOCK


def test_before_the_first_upload_there_is_nothing_to_pull(aws, project, command, played):
    command(*START, "--detach")
    played.put("boot.log", f"arn:aws:iam::{ACCOUNT}:role/x")
    pulled = command("host", "pull", RUN)
    assert pulled.exit_code == 0, pulled.output
    assert "has left no dvc.lock yet" in pulled.output
    assert (project / ".state/hosts" / RUN / "boot.log").read_text() == "arn:aws:iam::***:role/x"
    assert command("host", "down", RUN).exit_code == 0


def test_a_file_of_the_same_size_is_fetched_again_if_it_differs(aws, project, command, played):
    command(*START, "--detach")
    kept = project / ".state/hosts" / RUN / "spool/one/files/0/x"
    asked = []

    def count(params, **_):
        asked.append(params["Key"])

    events = aws.client("s3").meta.events
    events.register("provide-client-params.s3.GetObject", count)
    try:
        for text in ("old", "new", "new"):
            played.put("spool/one/files/0/x", text)
            assert command("host", "pull", RUN).exit_code == 0
            assert kept.read_text() == text
    finally:
        events.unregister("provide-client-params.s3.GetObject", count)
    assert len([key for key in asked if key.endswith("/0/x")]) == 2
    assert command("host", "down", RUN).exit_code == 0


def test_a_host_that_failed_says_where_and_shows_its_last_lines(aws, project, command, played):
    played.plays(
        played.prints("train", "all is well", f"error: no such thing in account {ACCOUNT}"),
        played.tells("failed", 1, "pipeline"),
    )
    done = command(*START)
    assert done.exit_code == 1
    assert "failed in pipeline" in done.output and "  error: no such thing in account ***" in done.output
    assert_nothing_is_left(aws)


def test_a_network_that_is_away_for_a_while_is_sat_out(aws, project, command, played):
    away = []

    def refuse(**_):
        if away:
            raise EndpointConnectionError(endpoint_url="https://ec2")

    events = aws.client("ec2").meta.events
    events.register("before-call.ec2.DescribeInstances", refuse)
    try:
        played.plays(lambda: away.append(1), lambda: None, away.clear, *ends_well(played))
        done = command(*START)
    finally:
        events.unregister("before-call.ec2.DescribeInstances", refuse)
    assert done.exit_code == 0, done.output
    assert "AWS cannot be reached" in done.output


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("[core]\n", "DVC has no default remote in .dvc/config"),
        ("[core]\n    remote = disk\n['remote \"disk\"']\n    url = /tmp/x\n", "which a host cannot reach"),
        (
            "[core]\n    remote = other\n['remote \"other\"']\n    url = s3://a-bucket/elsewhere/dvc\n",
            "may read below s3://a-bucket/cnn-tuning/ only",
        ),
    ],
)
def test_without_a_remote_nothing_starts(aws, project, command, played, config, told):
    (project / ".dvc/config").write_text(config)
    done = command(*START)
    assert done.exit_code == 1
    assert told in done.output
    assert_nothing_is_left(aws)


def test_a_refused_launch_spends_its_number(aws, project, command, played):
    codes = [{"ErrorCode": "InsufficientInstanceCapacity", "ErrorMessage": "none", "Lifecycle": "spot"}]
    tokens = []

    def refuse(params):
        tokens.append(params["body"]["ClientToken"])
        return {"FleetId": "fleet-1", "Errors": codes, "Instances": []}

    stop = intercept(aws.client("ec2"), "CreateFleet", refuse)
    try:
        for _ in range(2):
            assert "no capacity now" in command(*START).output
    finally:
        stop()
    assert len(set(tokens)) == 2
    assert_nothing_is_left(aws)
    played.plays(*ends_well(played))
    assert command(*START).exit_code == 0


def test_a_ctrl_c_at_the_launch_spends_its_number(aws, project, command, played):
    def interrupt(_):
        raise KeyboardInterrupt

    stop = intercept(aws.client("ec2"), "CreateFleet", interrupt)
    try:
        assert command(*START).exit_code != 0
    finally:
        stop()
    assert json.loads(played.get("run.json"))["attempts"] == 1
    assert_nothing_is_left(aws)


def test_replacing_waits_for_capacity(aws, project, command, played, monkeypatch):
    codes = [{"ErrorCode": "InsufficientInstanceCapacity", "ErrorMessage": "none", "Lifecycle": "spot"}]
    refuse = []

    def run_out():
        refuse.append(
            intercept(
                aws.client("ec2"),
                "CreateFleet",
                lambda _: {"FleetId": "fleet-1", "Errors": codes, "Instances": []},
            )
        )

    monkeypatch.setattr(host_follow, "wait", lambda: refuse.pop()())
    played.plays(played.at_once(run_out, played.tells("interrupted", 75)), *ends_well(played))
    done = command(*START)
    assert done.exit_code == 0, done.output
    assert "no capacity now" in done.output and "trying again" in done.output
    assert_nothing_is_left(aws)


def test_a_host_that_ec2_does_not_show_yet_is_not_replaced(aws, project, command, played):
    unknown = []

    def deny(params, **_):
        if unknown and "InstanceId.1" in params["body"]:
            raise ClientError({"Error": {"Code": "InvalidInstanceID.NotFound"}}, "DescribeInstances")

    events = aws.client("ec2").meta.events
    events.register("before-call.ec2.DescribeInstances", deny)
    try:
        unknown.append(1)
        played.plays(lambda: None, unknown.clear, *ends_well(played))
        done = command(*START)
    finally:
        events.unregister("before-call.ec2.DescribeInstances", deny)
    assert done.exit_code == 0, done.output
    assert "on 1 host" in done.output


def test_a_launch_that_was_cut_off_is_gone_on_with(aws, project, command, played):
    # The host runs, and the laptop dies before it has written that down.
    real, calls = follow.instance_of, []

    def instance_of(*arguments):
        calls.append(arguments)
        raise SystemExit(9)

    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(follow, "instance_of", instance_of)
        assert command(*START).exit_code == 9
    assert calls and real is follow.instance_of
    one = played.instance["InstanceId"]
    played.plays(*ends_well(played))
    done = command(*START)
    assert done.exit_code == 0, done.output
    assert f"host {one}," in done.output and "which ran already" in done.output
    assert "on 1 host" in done.output
    assert_nothing_is_left(aws)


@pytest.fixture
def lost(aws, project, command, played):
    """The bodies of requests for a fleet; the answer to the first was lost, and the laptop died."""
    bodies = []

    def note(request, **_):
        bodies.append(request.body)

    events = aws.client("ec2").meta.events
    events.register_first("before-send.ec2.CreateFleet", note)
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(follow, "instance_of", lambda *_: sys.exit(9))
        assert command(*START, "--detach").exit_code == 9
    yield bodies
    events.unregister("before-send.ec2.CreateFleet", note)


def test_a_launch_whose_answer_was_lost_is_asked_for_in_the_same_words(aws, played, command, lost, monkeypatch):
    kept = json.loads(played.get("run.json"))
    assert kept["asked"] and kept["ends"]
    played.passed += timedelta(minutes=3)
    with monkeypatch.context() as unseen:  # EC2 does not show it yet; unlike EC2, moto starts another one
        unseen.setattr(inventory, "instances", lambda *_: [])
        done = command(*START, "--detach")
    assert done.exit_code == 0, done.output
    assert len(lost) == 2 and "expires-at" in lost[0]
    assert lost[0] == lost[1]
    record = json.loads(played.get("run.json"))
    assert (record["attempts"], record["asked"], record["ends"]) == (1, None, None)
    assert record["hosts"][0]["ends"] == kept["ends"]


@pytest.mark.parametrize("how", ["later", "after down"])
def test_a_launch_that_came_to_nothing_is_not_asked_for_again(aws, played, command, lost, how):
    if how == "later":
        played.gone()()
        played.passed += timedelta(minutes=6)
    else:
        assert command("host", "down", RUN).exit_code == 0
    done = command(*START, "--detach")
    assert done.exit_code == 0, done.output
    tokens = [parse_qs(body)["ClientToken"] for body in lost]
    assert len(tokens) == 2 and tokens[0] != tokens[1]
    assert "ATTEMPT=1\n" in user_data(aws, played.instance["InstanceId"])


SHUT_DOWN = {"state": "failed", "exit": 143}
HAND, SPOT = "Client.UserInitiatedShutdown", "Server.SpotInstanceTermination"


@pytest.mark.parametrize(
    ("instance", "reason", "state", "verdict"),
    [
        ("pending", "", {}, "going"),
        ("running", "", {"state": "started"}, "going"),
        ("running", "", {"state": "finished"}, "finished"),
        ("running", "", {"state": "interrupted"}, "interrupted"),
        ("shutting-down", HAND, {"state": "interrupted"}, "ended"),  # a shutdown looks like a notice to the host
        ("terminated", SPOT, {"state": "interrupted"}, "interrupted"),
        ("terminated", HAND, {"state": "finished"}, "finished"),
        ("terminated", HAND, {"state": "started"}, "ended"),
        ("terminated", SPOT, {"state": "started"}, "vanished"),
        ("terminated", SPOT, {}, "vanished"),
        (None, "", {}, "vanished"),
        ("running", "", SHUT_DOWN, "going"),
        ("shutting-down", HAND, SHUT_DOWN, "ended"),
        ("shutting-down", SPOT, SHUT_DOWN, "vanished"),
        ("terminated", "Client.InstanceInitiatedShutdown", SHUT_DOWN, "failed"),
        ("terminated", SPOT, {"state": "failed", "exit": 1}, "failed"),
        ("running", "", {"state": ["odd"]}, "going"),
    ],
)
def test_what_became_of_a_host(instance, reason, state, verdict):
    assert follow.judge(follow.Look(instance, reason, state=state)) == verdict


def test_a_spool_that_went_another_way_is_delivered_again(
    aws, project, command, played, store_db, rows, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_db}")
    command(*START, "--detach")
    values = [{"event": "metrics", "step": step, "values": {"train/loss": 0.5}} for step in range(3)]
    first = spooled("one", values)
    played.put("spool/one.jsonl", first)
    assert command("host", "pull", RUN).exit_code == 0  # no dvc.lock yet
    assert "not ended yet" in command("host", "pull", RUN).output
    again = {"event": "metrics", "step": 7, "values": {"train/accuracy": 0.9}}
    end = {"event": "finish", "status": "FINISHED", "error": ""}
    # The replacement went on from an earlier checkpoint.
    head = b"".join(first.splitlines(keepends=True)[:2])
    played.put("spool/one.jsonl", head + b"".join(spooled("one", [again, end]).splitlines(keepends=True)[1:]))
    played.put("spool/../../../outside", "x")
    command("host", "pull", RUN)
    assert rows(store_db, "select status from runs") == [("FINISHED",)]
    assert rows(store_db, "select step from metrics where key = 'train/accuracy'") == [(7,)]
    assert not list(project.parent.rglob("outside"))


def test_a_terminal_shows_where_it_stands(aws, project, command, played, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    played.plays(*ends_well(played))
    done = command(*START)
    assert done.exit_code == 0, done.output
    assert f"run {RUN} · {'i-'}" in done.output and "of $2.00 · ends by itself in" in done.output
    assert "Ctrl-C leaves it alone" in done.output and ACCOUNT not in done.output


def test_a_hosts_time_that_is_up_before_the_runs_is_followed_by_another(aws, project, command, played):
    # Its time is reckoned at the on-demand price, and spot takes much less of the budget.
    played.plays(
        played.at_once(played.waits(minutes=28), played.tells("over-budget", 75, "train")), *ends_well(played)
    )
    done = command(*START, "--budget", "0.5", "host.candidates=[g5.xlarge]")
    assert done.exit_code == 0, done.output
    assert "as its time is up; the run has some left" in done.output and "on 2 hosts" in done.output
    assert_nothing_is_left(aws)
