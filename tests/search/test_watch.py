"""Silence is counted by the watcher's own clock, and not for time in which it did not look."""

from __future__ import annotations

from optuna.trial import TrialState, create_trial

from cnn_tuning.search.watch import Watch


def at(seconds, number=0, worker="a:1:1.0"):
    trial = create_trial(state=TrialState.RUNNING, user_attrs={"worker": worker, "seconds": seconds})
    trial.number = number
    return trial


def test_a_trial_that_gives_signs_is_never_silent():
    watch = Watch(3)
    assert [t for second in range(100) for t in watch.silent([at(second // 3)], second)] == []


def test_a_silent_one_is_found_after_the_grace_and_others_are_not():
    watch = Watch(3)
    found = [[t.number for t in watch.silent([at(7.0), at(second, 1)], second)] for second in range(6)]
    assert found == [[], [], [], [], [0], [0]]


def test_another_process_on_the_same_trial_starts_anew():
    watch = Watch(3)
    for second in range(4):
        assert watch.silent([at(7.0)], second) == []
    for second in range(4, 8):
        assert watch.silent([at(7.0, worker="a:2:1.0")], second) == []
    assert watch.silent([at(7.0, worker="a:2:1.0")], 8)


def test_a_watcher_that_was_itself_stopped_accuses_nobody():
    watch = Watch(30)
    assert watch.silent([at(7.0)], 0) == []
    assert watch.silent([at(7.0)], 10_000) == []
    assert watch.silent([at(8.0)], 10_001) == []
