"""A live front under requests of any kind: one answer each, no 500, and it lives on (longer: bench/fuzz.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from mutations import Target
from requests_to_front import front_targets


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    with front_targets() as made:
        yield {target.name: target for target in made}


@pytest.mark.parametrize("name", ["front", "front, raw bytes"])
def test_any_request_has_an_answer(targets, name):
    @settings(
        max_examples=targets[name].examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(targets[name].inputs)
    def holds(data):
        targets[name].check(data)

    holds()
