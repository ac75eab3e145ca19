"""Row 9: a fit with a changed hyperparameter does not continue the old one, names it and starts anew."""

from __future__ import annotations

import pytest
from striking import SAVING, by_hand  # noqa: F401
from training_recipes import SHORT, SignalAt

from cnn_tuning.config import DiagnosisConfig, RuleConfig, patch
from cnn_tuning.data.shards import write_shards
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted


def test_09_a_changed_hyperparameter_starts_anew_and_is_named(packed, recipe, tmp_path, capfd):
    short = patch(recipe, SHORT)
    with pytest.raises(Interrupted):
        fit(short, packed, state_folder=tmp_path, callbacks=[SignalAt(10)])
    changed = fit(patch(short, {"optimizer.learning_rate": 0.02}), packed, state_folder=tmp_path)
    told = capfd.readouterr().err
    assert "optimizer.learning_rate (0.01 → 0.02)" in told
    assert "starting a new run" in told
    assert changed.resumed_from == 0
    # The unfinished run is still there, and the old value goes on with it.
    assert fit(short, packed, state_folder=tmp_path).resumed_from == 10


def test_09_a_stop_rule_that_is_switched_on_starts_anew(packed, recipe, tmp_path, capfd):
    short = patch(recipe, SHORT)

    def watched(action):
        rules = {"loss_not_decreasing": RuleConfig(action, {"drop": 0.01})}
        return Watch(short, DiagnosisConfig("some", rules=rules), "train").callbacks

    with pytest.raises(Interrupted):
        fit(short, packed, state_folder=tmp_path, callbacks=[*watched("warn"), SignalAt(10)])
    assert fit(short, packed, state_folder=tmp_path, callbacks=watched("stop")).resumed_from == 0
    assert "changed diagnosis.stopping.loss_not_decreasing (None →" in capfd.readouterr().err
    assert fit(short, packed, state_folder=tmp_path, callbacks=watched("warn")).resumed_from == 10


def test_09_other_shards_of_the_same_data_start_anew(packed, recipe, tmp_path, capfd):
    write_shards(packed, str(tmp_path / "shards"), 0.02)
    streamed = patch(recipe, SHORT | {"trainer.stream": str(tmp_path / "shards")})
    with pytest.raises(Interrupted):
        fit(streamed, packed, state_folder=tmp_path / "state", callbacks=[SignalAt(10)])
    write_shards(packed, str(tmp_path / "shards"), 0.01)
    assert fit(streamed, packed, state_folder=tmp_path / "state").resumed_from == 0
    assert "changed trainer.stream.index (" in capfd.readouterr().err


@pytest.mark.slow
def test_09_a_stage_by_hand(by_hand):  # noqa: F811
    by_hand.interrupted("train", *SAVING, at="train 5")
    old = by_hand.checkpoints()
    assert old[-1].name == "step-00000005.ckpt"  # the fault is real: there is something to go on from
    again = by_hand.stage("train", *SAVING, "optimizer.learning_rate=0.02")
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert "not continuing the unfinished .state/train/" in printed
    assert "optimizer.learning_rate (" in printed
    assert "going on from" not in printed
    assert by_hand.ends() == ["KILLED", "FINISHED"]
    assert by_hand.checkpoints() == old
