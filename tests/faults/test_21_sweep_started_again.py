"""Row 21: an interrupted sweep is started again; only the missing trials run, and it ends as if undisturbed."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from searching import Sweep, found, running, search_with, states, tags

pytestmark = pytest.mark.slow
SEARCH = {"budget": {"trials": 7}, "pruner": {"name": "median", "startup_trials": 5}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_data):
    sweep = Sweep(tmp_path_factory.mktemp("whole"), digits_data, search_with(**SEARCH), ("trainer.max_epochs=8",))
    sweep.run()
    return found(sweep.trials())


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_21_only_the_missing_trials_run(tmp_path, digits_data, undisturbed, signum):
    sweep = Sweep(tmp_path, digits_data, search_with(**SEARCH), ("trainer.max_epochs=8",))
    process = sweep.start()
    sweep.until(lambda trials: states(trials)[:3].count("COMPLETE") == 3 and running(trials))
    process.send_signal(signum)
    process.communicate()
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum)
    # A killed sweep's worker sees that it is alone, saves, and lets the trial wait.
    stopped = sweep.until(lambda trials: "RUNNING" not in states(trials))
    done = [t.number for t in stopped if t.state.is_finished()]
    assert done[:3] == [0, 1, 2]
    assert len(done) < 7
    runs_before = len(sweep.runs())
    sweep.run()
    assert found(sweep.trials()) == undisturbed
    again = Counter(tags(run)["trial.number"] for run in sweep.runs()[runs_before:])
    assert again == Counter(str(n) for n in range(7) if n not in done)
