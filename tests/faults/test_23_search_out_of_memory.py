"""Row 23: of a search; one trial needs more memory than there is; that one fails and says so, the others go on."""

from __future__ import annotations

import pytest
from searching import Sweep, search_with, states

pytestmark = pytest.mark.slow


def test_23_one_trial_fails_and_the_search_goes_on(tmp_path, digits_data):
    # A dense layer of a billion units: a terabyte.
    space = {"model.arguments.units": {"kind": "categorical", "choices": [16, 10**9, 32]}}
    search = search_with(space=space, sampler={"name": "grid"}, budget={"trials": 3})
    sweep = Sweep(tmp_path, digits_data, search, ("model=lab_cnn", "trainer.max_epochs=1"))
    study = sweep.run()
    assert states(study.trials) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "memory" in study.trials[1].user_attrs["reason"]
    assert "\n" not in study.trials[1].user_attrs["reason"]
