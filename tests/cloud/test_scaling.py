"""The prediction for several hosts: its limits, and the table of `host plan --nodes`."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import ROOT

from cnn_tuning.cloud.plan import Option
from cnn_tuning.cloud.scaling import Link, Work, exchange_seconds, predict
from cnn_tuning.config import compose
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_nodes import predicted

sys.path.append(str(ROOT / "bench"))
scaling = importlib.import_module("scaling")

works = st.builds(
    Work,
    batch=st.integers(1, 10_000),
    images=st.integers(1, 10**9),
    samples_per_second=st.floats(1, 1e6),
    gradient_bytes=st.integers(4, 10**9),
)
links = st.builds(Link, bytes_per_s=st.floats(1e6, 1e11), latency_s=st.floats(0, 1e-2))


@given(work=works, link=links, nodes=st.integers(1, 64))
def test_more_hosts_are_never_faster_than_their_number_nor_cheaper(work, link, nodes):
    one, many = (predict(work, count, link, usd_per_hour=1.0) for count in (1, nodes))
    assert one.samples_per_second == pytest.approx(work.samples_per_second)
    assert one.efficiency == pytest.approx(1)
    assert 0 < many.efficiency <= 1 + 1e-9
    assert many.samples_per_second <= nodes * work.samples_per_second * (1 + 1e-9)
    assert many.usd >= one.usd * (1 - 1e-9)


def test_an_exchange_takes_what_a_ring_takes():
    # 100 MB around four at 1 GB/s: 2·3/4 of the bytes; four buckets and the loss, six turns each.
    link = Link(1e9, 1e-3)
    assert exchange_seconds(100 * 10**6, 4, link) == pytest.approx(0.15 + 5 * 6 * 1e-3)
    assert exchange_seconds(100 * 10**6, 1, link) == 0
    assert Link.of_gbit(8).bytes_per_s == 1e9


def test_a_plan_pays_for_every_host_and_says_what_it_lacks():
    config = compose(["experiment=mnist", "trainer.max_epochs=10", "host.setup_minutes=6"], params=None)
    found = Option("g5.xlarge", "A10G", 4, 16, "measured", 10_000, 1.0, 1.0, {"a": 0.4})
    one, four = predicted(config, found, [1, 4], images=60_000, weights=25_000_000)
    assert one.hours == pytest.approx(60_000 * 10 / 10_000 / 3600 + 0.1)
    # 100 MB over 2.5 Gbit/s: a small network is not worth four hosts.
    assert four.exchange_s == pytest.approx(0.48 + 5 * 6 * 100e-6)
    assert four.samples_per_second < one.samples_per_second
    assert 4 * 0.4 < four.usd / four.hours < 4 * 0.45
    unknown = Option("g5.xlarge", "A10G", 4, 16, "unknown", None, None, 1.0)
    with pytest.raises(UserError, match="no speed is known"):
        predicted(config, unknown, [1], images=60_000, weights=1)
    with pytest.raises(UserError, match="network_gbit is missing"):
        predicted(config, Option("p3.2xlarge", "V100", 8, 61, "unknown", 1, 1, 1), [1], images=1, weights=1)


def test_the_command_prints_what_several_hosts_would_make_of_it(aws, folder, command, packed):
    (folder / "data").mkdir()
    (folder / "data/prepared").symlink_to(packed.path)
    only = ("experiment=digits", "host.candidates=[g5.xlarge]")
    asked = ("host", "plan", *only, "--measured", "g5.xlarge=61000", "--nodes", "1,4")
    told = json.loads(command(*asked, "--json").output)
    one, four = told["nodes"]
    assert (told["experiment"], told["type"], told["basis"]) == ("digits", "g5.xlarge", "measured")
    assert (one["nodes"], one["exchange_s"], one["efficiency"]) == (1, 0, 1)
    assert four["exchange_s"] > 4 * told["weights"] * 1.5 * 8 / (told["network_gbit"] * 1e9)
    assert one["usd"] < four["usd"] < 4 * one["usd"] * 1.5
    shown = command(*asked)
    assert shown.exit_code == 0, shown.output
    assert f"digits on g5.xlarge (measured), spot: {told['weights']:,} weights, batches of" in shown.output
    assert f"{1000 * four['step_s']:.2f}" in shown.output
    assert "Predicted, not measured" in shown.output
    done = command(*asked[:-1], "1,x")
    assert done.exit_code == 1 and "--nodes 1,x: must be numbers from 1 to 1024" in done.output


def test_the_bench_finds_the_link_again_and_predicts_the_steps_that_were_made_with_it():
    # A million weights at 2 GB/s, 100 µs a turn; a whole batch takes 50 ms, half of it 30.
    smallest_s, gradients_s = 2 * 100e-6, 4e6 / 2e9 + 2 * 100e-6
    link = Link(2e9, 100e-6)
    two_s = 0.03 + exchange_seconds(4_000_000, 2, link)
    figures = scaling._compared(
        {
            "one": {"batch": 100, "weights": 1_000_000, "samples_per_second": 2000.0},
            "half_batch": {"step_s": 0.03},
            "two": {"step_s": two_s, "samples_per_second": 100 / two_s},
            "smallest_exchange_s": smallest_s,
            "gradient_exchange_s": gradients_s,
        }
    )
    assert figures["link_bytes_per_s"] == pytest.approx(2e9)
    assert figures["link_latency_s"] == pytest.approx(100e-6)
    assert figures["predicted_step_s"] == pytest.approx(figures["measured_step_s"])
    assert figures["predicted_samples_per_second"] == pytest.approx(figures["measured_samples_per_second"])
    # Half of the whole batch's time, as `host plan --nodes` takes it.
    assert figures["planned_step_s"] == pytest.approx(0.025 + figures["exchange_s"])
