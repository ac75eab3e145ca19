"""Row 40: when the budget is reached the host stops by itself, the work is saved, and the cost is stated.

First both sides of a shrunk budget, the host played; then the real agent. That the host is gone then, whatever
it does, is shown by tests/cloud/test_boot.py and by the guards' tests.
"""

from __future__ import annotations

import json
import re
import time

import pytest
from agents import PLACE, Agent
from played_host import ends_well, played  # noqa: F401
from renting import (  # noqa: F401
    _price_server,
    _shared,
    aws,
    command,
    credentials,
    folder,
    images,
    leave_nothing,
    no_aws,
    prices,
    project,
)
from seaweed import _weed, seaweed  # noqa: F401

from cnn_tuning.cloud.teardown import all_runs

# A g5.xlarge is $1.006 an hour: a budget of half an hour.
RUN = ("host", "run", "--yes", "--run", "run-one", "--on-demand", "--budget", "0.5")


def assert_host_is_gone_and_cost_stated(aws, done):  # noqa: F811
    assert done.exit_code == 1, done.output
    [usd] = re.findall(r"cost: \$(\d\.\d+) of \$0\.50", done.output)
    assert 0.4 < float(usd) < 0.6
    assert all_runs(aws, "cnn-tuning") == []
    leave_nothing(aws)


def test_40_a_host_is_asked_to_save_and_is_gone(aws, project, command, played):  # noqa: F811
    asked = []
    played.plays(
        played.tells("started"),
        played.waits(minutes=28),
        lambda: asked.append(json.loads(played.get("stop.json"))),
        played.tells("over-budget", 75, "train"),
    )
    done = command(*RUN)
    assert asked == [{"why": "budget", "attempt": 0}]
    assert "time or budget is up; its work is saved" in done.output
    assert_host_is_gone_and_cost_stated(aws, done)
    # More money: the next host goes on, and is not told to stop at once.
    played.plays(*ends_well(played))
    more = command("host", "run", "--yes", "--run", "run-one", "--budget", "5")
    assert more.exit_code == 0, more.output
    assert played.get("stop.json") is None
    assert "cost: $" in more.output and "of $5.00" in more.output


def test_40_a_host_that_does_not_listen_is_ended(aws, project, command, played):  # noqa: F811
    played.plays(played.waits(minutes=28), played.waits(seconds=1), played.waits(minutes=3))
    done = command(*RUN)
    assert "did not save its work in time" in done.output
    assert_host_is_gone_and_cost_stated(aws, done)


@pytest.fixture
def agent(tmp_path, seaweed):  # noqa: F811
    return Agent(tmp_path, seaweed)


def assert_saved_and_stated(agent, process):
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert not (agent.project / ".state/train/result").exists()  # the fault is real: there was more to do
    assert agent.json("checkpoints/latest.json")["stage"] == "train"
    assert (agent.project / ".state/train/saved").exists()
    state = agent.json("state.json")
    assert (state["state"], state["exit"]) == ("over-budget", 75)
    assert state["usd"] == pytest.approx(state["hours"] * 3600, rel=0.1)  # at $1 a second
    assert state["usd"] > 0
    assert re.search(
        r"over-budget: 0\.00 h of this host, \$\d+\.\d{4} at the most; another host can go on", printed
    )
    assert json.loads((agent.folder / "told.json").read_text()) == state


def test_40_the_lifetime_that_the_budget_pays_is_over(agent):
    ends = time.time() + 35
    process = agent.work("--ends-at", str(ends), "--margin", "27")
    assert_saved_and_stated(agent, process)
    assert (agent.project / ".state/train/saved").stat().st_mtime < ends


def test_40_a_lifetime_shorter_than_the_margin_is_worked_for_half(agent):
    process = agent.work("--ends-at", str(time.time() + 8))
    agent.wait_for(".state/train/begun", process)
    assert_saved_and_stated(agent, process)


def test_40_the_laptop_says_that_it_is_spent(agent):
    process = agent.work()
    agent.wait_for(".state/train/begun", process)
    agent.store.put(f"{PLACE}/stop.json", b'{"why": "budget", "attempt": 0}')
    assert_saved_and_stated(agent, process)


def test_40_it_is_heard_during_a_long_push(agent):
    pushing, released = agent.folder / "pushing", agent.folder / "released"
    (agent.folder / "bin/dvc").write_text(
        f"#!/bin/sh\ntouch {pushing}\nwhile [ ! -e {released} ]; do sleep 0.1; done\n"
    )
    process = agent.work("--save-every", "0.1")
    agent.wait_for("../pushing", process)
    agent.store.put(f"{PLACE}/stop.json", b'{"why": "budget", "attempt": 0}')
    agent.wait_for(".state/train/saved", process)  # the push is still at work
    released.touch()
    assert_saved_and_stated(agent, process)


def test_40_what_was_said_to_the_host_before_is_not_for_this_one(agent):
    agent.store.put(f"{PLACE}/stop.json", b'{"why": "budget", "attempt": 0}')
    process = agent.work(seconds=1.5, attempt=1)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert agent.json("progress.json")["lines"]
