"""Row 11: SIGTERM in validation, or before the first batch; as in a batch, or the last checkpoint stands."""

from __future__ import annotations

import signal

import pytest
from pytorch_lightning.callbacks import Callback
from striking import SAVING, by_hand  # noqa: F401
from training_recipes import SHORT

from cnn_tuning.config import patch
from cnn_tuning.training import resume
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted


class SignalInValidation(Callback):
    """Sends this process a SIGTERM when the first validation begins."""

    sent = False

    def on_validation_start(self, *_):
        signal.raise_signal(signal.SIGTERM)
        self.sent = True


def test_11_a_short_validation_ends_first(packed, recipe, tmp_path):
    striking = SignalInValidation()
    with pytest.raises(Interrupted) as stopped:
        fit(patch(recipe, SHORT), packed, state_folder=tmp_path, callbacks=[striking])
    assert striking.sent  # the fault is real
    assert stopped.value.code == 128 + signal.SIGTERM
    assert stopped.value.saved.name == "step-00000021.ckpt"  # the epoch's end
    assert fit(patch(recipe, SHORT), packed, state_folder=tmp_path).resumed_from == 21


def test_11_a_long_validation_is_given_up(packed, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "GRACE_S", -1.0)  # any validation is longer than that
    often = patch(recipe, SHORT | {"trainer.checkpoint_every_s": 1e-6})
    with pytest.raises(Interrupted) as stopped:
        fit(often, packed, state_folder=tmp_path, callbacks=[SignalInValidation()])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert stopped.value.saved.name == "step-00000020.ckpt"  # the last before the validation
    assert fit(often, packed, state_folder=tmp_path).resumed_from == 20


@pytest.mark.slow
def test_11_a_stage_in_validation(by_hand):  # noqa: F811
    process = by_hand.stage("train", "trainer.max_epochs=2", at="eval 1")
    by_hand.reached(process)
    process.send_signal(signal.SIGTERM)
    by_hand.go_on()
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, printed
    (saved,) = by_hand.checkpoints()
    assert f"SIGTERM: state saved in {saved.relative_to(by_hand.path)}" in printed
    assert by_hand.ends() == ["KILLED"]


@pytest.mark.slow
def test_11_a_stage_before_its_first_batch(by_hand):  # noqa: F811
    process = by_hand.stage("train", *SAVING)
    by_hand.until(lambda: list((by_hand.path / ".state/train").glob("*/recipe.json")), process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "Traceback" not in printed
    assert by_hand.ends() == ["KILLED"]
    assert not (by_hand.path / "models/baseline/model.json").exists()
    # It struck before the first batch had ended.
    assert [path.name for path in by_hand.checkpoints()] in ([], ["step-00000001.ckpt"])


@pytest.mark.slow
def test_11_a_stage_before_the_first_batch_of_its_second_start(by_hand):  # noqa: F811
    by_hand.interrupted("train", *SAVING, at="train 5")
    again = by_hand.stage("train", *SAVING)
    printed = ""
    while "going on from" not in printed:
        line = again.stdout.readline()
        assert line, printed
        printed += line
    assert "step-00000005.ckpt at step 5" in printed
    again.send_signal(signal.SIGTERM)
    rest, _ = again.communicate(timeout=200)
    assert again.returncode == 128 + signal.SIGTERM, printed + rest
    assert "Traceback" not in rest
    assert by_hand.ends() == ["KILLED"]
    # It struck before the first batch had ended.
    assert by_hand.checkpoints()[-1].name in ("step-00000005.ckpt", "step-00000006.ckpt")
    third = by_hand.stage("train", *SAVING)
    printed, _ = third.communicate(timeout=200)
    assert third.returncode == 0, printed
    assert "going on from" in printed
