"""Readers of files of others: damaged ones give a result or a line, within bounds (`bench/fuzz.py` tries more)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from mutations import Target
from readers import slow_targets, targets


@pytest.mark.parametrize("target", [*targets(), *slow_targets()], ids=lambda target: target.name)
def test_a_damaged_file_gives_a_result_or_a_line(target: Target):
    # Failures are shown as found: shrinking them is for the long run by hand.
    @settings(
        max_examples=target.examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def holds(data):
        target.check(data)

    holds()
