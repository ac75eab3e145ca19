"""Row 9: a fit with a changed hyperparameter does not continue the old one, names it and starts anew."""

from __future__ import annotations

import pytest
from training_recipes import SHORT, SignalAt

from cnn_tuning.config import patch
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
