"""Ranking: time from speeds, dollars from time, refusals with their reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from renting import ROOT, host_config, option

from cnn_tuning.cloud.names import Order, lifetime, name_of, token
from cnn_tuning.cloud.plan import Measured, Work, dearest_per_hour, extras_per_hour, rank
from cnn_tuning.cloud.prices import Market
from cnn_tuning.errors import UserError
from cnn_tuning.stages.lineage import UNRECORDED

WORK = Work(images=36_000_000, model="compact_cnn")
PRICES = Market(
    on_demand={"g4dn.xlarge": 0.526, "g5.xlarge": 1.006, "c7i.2xlarge": 0.357},
    spot={
        "g4dn.xlarge": {"us-east-1a": 0.2, "us-east-1b": 0.18},
        "g5.xlarge": {"us-east-1a": 0.4},
        "c7i.2xlarge": {"us-east-1a": 0.15},
    },
    quotas={"L-3819A6DF": 8.0, "L-34B43A08": 4.0},
)
THREE = ("g4dn.xlarge", "g5.xlarge", "c7i.2xlarge")


def by_type(options):
    return {found.type: found for found in options}


def test_a_measured_type_is_taken_at_its_word():
    host = host_config(candidates=THREE, setup_minutes=6.0, max_hours=100)
    measured = [Measured(5000, cores=2), Measured(10_000, instance_type="g5.xlarge")]
    found = by_type(rank(host, WORK, measured, PRICES))
    g5 = found["g5.xlarge"]
    assert g5.basis == "measured"
    assert g5.hours == pytest.approx(1 + 0.1)
    assert g5.usd_spot["us-east-1a"] == pytest.approx(1.1 * (0.4 + extras_per_hour(host)))
    assert g5.usd_on_demand == pytest.approx(1.1 * (1.006 + extras_per_hour(host)))
    # The others are scaled from the newest run by the estimated speeds.
    g4dn = found["g4dn.xlarge"]
    assert g4dn.basis == "scaled from a measured run"
    ratio = host.types["g4dn.xlarge"].speed / host.types["g5.xlarge"].speed
    assert g4dn.samples_per_second == pytest.approx(10_000 * ratio)


def test_without_a_run_the_table_is_used_or_nothing():
    host = host_config(candidates=("c7i.2xlarge",))
    [found] = rank(host, WORK, [], Market())
    assert found.basis == "calibration table"
    assert found.samples_per_second == pytest.approx(2950 * host.types["c7i.2xlarge"].speed)
    [found] = rank(host, replace(WORK, model="never_seen"), [], Market())
    assert (found.basis, found.hours, found.refused) == ("unknown", None, None)


def test_a_v100_is_refused_with_reason_and_replacement():
    [found] = rank(host_config(candidates=("p3.2xlarge",)), WORK, [], Market())
    assert "V100" in found.refused and "7.5" in found.refused
    assert "take g5.xlarge instead" in found.refused


@pytest.mark.parametrize(
    ("changes", "market", "told"),
    [
        ({}, replace(PRICES, quotas={"L-3819A6DF": 2.0}), "quota is 2 vCPUs of 4"),
        ({}, replace(PRICES, used={"L-3819A6DF": 6.0}), "quota is 8 vCPUs of 4, 6 in use"),
        ({"max_price_per_hour": 0.1}, PRICES, "max_price_per_hour"),
        ({"max_hours": 0.1}, PRICES, "host.max_hours"),
        ({"budget": 0.01}, PRICES, "host.budget"),
        ({"market": "on-demand", "budget": 0.02}, PRICES, "host.budget"),
        ({}, Market(on_demand={"c7i.xlarge": 0.1}), "no spot price"),
    ],
)
def test_what_may_not_be_taken_says_why(changes, market, told):
    host = host_config(candidates=("g4dn.xlarge",), **changes)
    [found] = rank(host, WORK, [Measured(10_000, cores=2)], market)
    assert told in found.refused


def test_the_cheapest_that_may_be_taken_comes_first():
    host = host_config(candidates=THREE, max_hours=100, budget=100)
    ranked = rank(host, WORK, [Measured(100, cores=2)], PRICES)
    assert ranked[-1].type == "c7i.2xlarge"  # 8 vCPUs of a quota of 4
    assert "quota" in ranked[-1].refused
    first, second = ranked[:2]
    assert min(first.usd_spot.values()) <= min(second.usd_spot.values())
    assert first.quota_ok is True


def test_a_type_that_is_not_described_is_refused_by_name():
    [found] = rank(host_config(candidates=("x9.huge",)), WORK, [], PRICES)
    assert "host.types" in found.refused


@given(
    hours=st.floats(0.1, 48), budget=st.floats(0.05, 100), price=st.floats(0.01, 40),
)  # fmt: skip
def test_no_lifetime_costs_more_than_agreed(hours, budget, price):
    try:
        lives = lifetime(hours, budget, price)
    except UserError:
        assert min(hours, budget / price) * 60 < 1
        return
    assert lives.total_seconds() <= hours * 3600 + 1e-6
    assert lives.total_seconds() / 3600 * price <= budget + 1e-6


def test_the_dearest_price_holds_the_cap_or_the_on_demand_price():
    spot = host_config()
    extras = extras_per_hour(spot)
    two = [option(), option("g4dn.xlarge", on_demand_per_hour=0.526)]
    assert dearest_per_hour(spot, two) == pytest.approx(1.006 + extras)
    assert dearest_per_hour(host_config(max_price_per_hour=0.6), two) == pytest.approx(0.6 + extras)
    falling_back = host_config(max_price_per_hour=0.6, on_demand_fallback=True)
    assert dearest_per_hour(falling_back, two) == pytest.approx(1.006 + extras)
    with pytest.raises(UserError, match=r"price unknown: g5\.xlarge"):
        dearest_per_hour(spot, [option(on_demand_per_hour=None)])


_RUNS = st.from_regex(r"[a-z0-9][a-z0-9-]{2,31}", fullmatch=True)


@given(_RUNS, _RUNS)
def test_tokens_are_the_same_for_a_retry_only(one, other):
    from datetime import UTC, datetime

    orders = [Order(run, "ann", "c", 1.0, datetime(2026, 1, 1, tzinfo=UTC)) for run in (one, other)]
    again = replace(orders[0], ends=datetime(2027, 1, 1, tzinfo=UTC))
    assert token(orders[0], "fleet") == token(again, "fleet")
    assert token(orders[0], "fleet") != token(replace(orders[0], attempt=1), "fleet")
    assert (token(orders[0], "fleet") == token(orders[1], "fleet")) == (one == other)
    assert len(token(orders[0], "fleet")) <= 64
    assert len(name_of("p" * 24, one) + ".guard") <= 64


@pytest.mark.parametrize("run", ["", "a", "Upper", "a_b", "x" * 33, "../x", "a b"])
def test_a_runs_name_fits_all_that_is_named_after_it(run):
    from datetime import UTC, datetime

    with pytest.raises(UserError, match="3 to 32"):
        Order(run, "ann", "c", 1.0, datetime.now(UTC))


def test_a_change_of_hosts_reruns_no_stage_and_is_recorded_with_no_run():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    listed = {name for stage in stages.values() for entry in stage.get("params", ()) for names in entry.values()
              for name in names}  # fmt: skip
    assert listed and not any(name.split(".")[0] == "host" for name in listed)
    assert "host" in UNRECORDED
