"""Row 22: of a search; in one trial the loss becomes NaN; that one fails with its cause, the others go on."""

from __future__ import annotations

import pytest
from searching import Sweep, search_with, states, status, tags

pytestmark = pytest.mark.slow


def test_22_one_trial_fails_and_the_search_goes_on(tmp_path, digits_data, capfd):
    space = {"optimizer.learning_rate": {"kind": "categorical", "choices": [0.01, 1e30, 0.02]}}
    search = search_with(space=space, sampler={"name": "grid"}, budget={"trials": 5})
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=1",))
    study = sweep.run()
    assert states(study.trials) == ["COMPLETE", "FAIL", "COMPLETE"]
    reason = study.trials[1].user_attrs["reason"]
    assert reason.startswith("the loss is no longer finite at step 1 (learning rate ")
    assert study.trials[1].params == {"optimizer.learning_rate": "1e+30"}
    run = sweep.runs()[1]
    assert status(run) == "FAILED"
    assert (tags(run)["trial.state"], tags(run)["trial.reason"]) == ("failed", reason)
    assert f"trial 1 failed ({reason})" in capfd.readouterr().err
