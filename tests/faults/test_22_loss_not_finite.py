"""Row 22: the loss becomes NaN; the step and the cause are named and a single training exits non-zero.

A search goes on with its other trials (test_22_search_not_finite), an ablation with its other arms
(tests/ablation/test_train.py).
"""

import math
import re

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from striking import by_hand  # noqa: F401
from training_recipes import SHORT

from cnn_tuning.config import patch
from cnn_tuning.training.fit import Diverged, fit


class Poison(Callback):
    """Make one weight NaN before a step."""

    def __init__(self, step):
        self.step, self.seen = step, []

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step:
            next(p for n, p in module.network.named_parameters() if n.endswith("weight")).data.view(-1)[0] = (
                math.nan
            )

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.seen.append(bool(torch.isfinite(outputs["loss"])))


def test_the_step_and_the_layer_are_named(packed, recipe, tmp_path):
    poison = Poison(7)
    with pytest.raises(Diverged) as caught:
        fit(patch(recipe, SHORT), packed, state_folder=tmp_path, callbacks=[poison])
    assert poison.seen == [True] * 7  # seven good steps, then none was taken
    assert re.search(
        r"no longer finite at step 7 \(learning rate [\d.e-]+; the weights of \S+ are not finite\)",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)


def test_a_learning_rate_that_explodes_is_named(packed, recipe, tmp_path):
    wild = patch(recipe, {**SHORT, "optimizer.learning_rate": 1e30})
    with pytest.raises(Diverged, match=r"at step 1 \(learning rate .*lower optimizer.learning_rate or set .*clip"):
        fit(wild, packed, state_folder=tmp_path)


@pytest.mark.slow
def test_a_single_training_fails_in_one_line(by_hand):  # noqa: F811
    process = by_hand.stage("train", "trainer.max_epochs=1", "optimizer.learning_rate=1e30")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    (told,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.search(r"no longer finite at step 1 \(learning rate .*lower optimizer\.learning_rate", told)
    assert not (by_hand.path / "models/baseline/model.json").exists()
    assert by_hand.ends() == ["FAILED"]
