"""The range test: repeatable, without traces, ends at an explosion; it suggests a rate at which the loss falls."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.config import patch
from cnn_tuning.diagnosis.range_test import range_test
from cnn_tuning.diagnosis.recording import Sweep
from cnn_tuning.diagnosis.rules.sweep import suggested
from cnn_tuning.training.fit import fit


def state_of_process():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_the_same_recipe_gives_the_same_sweep_and_leaves_no_trace(packed, recipe):
    chosen = patch(recipe, {"model.dropout": "both", "augment.shift": 0.1})
    before = state_of_process()
    one = range_test(chosen, packed, steps=25)
    assert state_of_process() == before
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(False)
    # Nor does it depend on the rate that the recipe has.
    two = range_test(patch(chosen, {"optimizer.learning_rate": 0.2}), packed, steps=25)
    assert one.loss.tobytes() == two.loss.tobytes()
    other = range_test(patch(chosen, {"seed": 1}), packed, steps=25)
    assert other.loss[0] != one.loss[0]


def test_the_suggestion_learns_and_the_explosion_ends_the_sweep(packed, recipe, tmp_path):
    sweep = range_test(recipe, packed)
    assert 10 < len(sweep.loss) == len(sweep.learning_rate) < 100
    assert sweep.loss[-1] > 1.2 * sweep.loss[0] > sweep.loss.min()
    rate = suggested(sweep)
    assert 1e-4 < rate < 0.02
    short = patch(recipe, {"trainer.max_epochs": 4, "optimizer.learning_rate": rate})
    assert fit(short, packed, state_folder=tmp_path).best["val/accuracy"] > 0.93


def test_rates_that_teach_nothing_suggest_nothing(packed, recipe):
    sweep = range_test(recipe, packed, steps=30, lowest=1e-9, highest=1e-7)
    assert len(sweep.loss) == 30
    assert suggested(sweep) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer.precision": "bf16", "trainer.gradient_clip": 1.0, "trainer.channels_last": False},
        {"trainer.batch_size": 1000, "trainer.data_on_device": "no"},  # more than one epoch
    ],
)
def test_recipes_of_all_sorts_are_swept(packed, recipe, settings):
    sweep = range_test(patch(recipe, settings), packed, steps=4, lowest=1e-5, highest=1e-3)
    assert np.isfinite(sweep.loss).all()
    np.testing.assert_allclose(sweep.learning_rate, np.geomspace(1e-5, 1e-3, 4), rtol=1e-5)


@given(
    at=st.floats(-4, -1),
    width=st.floats(0.2, 0.6),
    low=st.floats(0.05, 1.5),
    rise=st.floats(0, 3),
)
def test_the_suggestion_is_where_a_loss_falls_most_steeply(at, width, low, rise):
    decades = np.linspace(-6, 1, 100)
    fall = (2.3 - low) / (1 + np.exp((decades - at) / width))
    loss = low + fall + rise * np.maximum(decades - 0.5, 0)
    found = suggested(Sweep((10**decades).astype(np.float32), loss.astype(np.float32)))
    assert np.log10(found) == pytest.approx(at, abs=0.15)


@given(st.floats(0.1, 10), st.floats(0, 3))
def test_a_loss_that_only_rises_suggests_nothing(start, rise):
    decades = np.linspace(-6, 1, 50)
    loss = start + rise * np.maximum(decades, -2)
    assert suggested(Sweep((10**decades).astype(np.float32), loss.astype(np.float32))) is None
