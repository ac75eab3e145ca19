"""Rules on curves: what they find, what they leave alone, and that more of a fault never hides it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from curve_recordings import EXPERIMENTS, answers, check_remedy, judged, recipe_of, recording
from hypothesis import given, settings
from hypothesis import strategies as st
from training_recipes import recipe_with

from cnn_tuning.diagnosis.recorder import Recorder
from cnn_tuning.diagnosis.recording import Sweep
from cnn_tuning.training.fit import fit

STEP_RULES = ("loss_not_decreasing", "stalled", "loss_spikes", "learning_rate_too_high", "learning_rate_too_low")
EPOCH_RULES = ("overfitting", "overtraining", "underfitting")
VAL = answers(np.diag([500] * 10))


def falling(steps: int = 400, to: float = 0.02, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Return losses that fall exponentially from 2.3, with the noise of batches."""
    random = np.random.default_rng(seed)
    return (to + (2.3 - to) * np.exp(-np.arange(steps) / (steps / 12))) * random.lognormal(0, noise, steps)


def creeping(steps: int = 200) -> np.ndarray:
    return np.linspace(2.3, 1.9, steps) + np.random.default_rng(0).normal(0, 0.02, steps)


@pytest.mark.parametrize("rule", [*STEP_RULES, *EPOCH_RULES])
@pytest.mark.parametrize("steps", [0, 1, 19])
def test_too_little_is_not_evaluated(rule, steps):
    assert judged(rule, recording([2.3] * steps)).status == "not evaluated"


@pytest.mark.parametrize("rule", STEP_RULES)
def test_a_start_that_was_not_seen_is_not_evaluated(rule):
    assert judged(rule, recording([*[np.nan] * 50, *falling()])).status == "not evaluated"


@pytest.mark.parametrize("rule", STEP_RULES)
@given(st.integers(20, 600), st.floats(0.0, 0.1), st.integers(0, 99))
@settings(max_examples=25)
def test_a_loss_that_falls_well_is_ok(rule, steps, noise, seed):
    assert judged(rule, recording(falling(steps, noise=noise, seed=seed))).status != "fired"


@pytest.mark.parametrize("rule", STEP_RULES)
@given(
    st.lists(st.floats(0.01, 50), min_size=20, max_size=120),
    st.integers(-6, 6),
)
@settings(max_examples=25)
def test_the_unit_of_the_loss_does_not_matter(rule, loss, exponent):
    one, other = (judged(rule, recording(np.array(loss) * unit)) for unit in (1, 2.0**exponent))
    assert (one.status, one.first_step, one.remedy) == (other.status, other.first_step, other.remedy)


@given(st.floats(1e-3, 1e3), st.integers(20, 300))
@settings(max_examples=25)
def test_a_constant_loss_does_not_decrease(level, steps):
    finding = judged("loss_not_decreasing", recording([level] * steps))
    assert finding.status == "fired"
    check_remedy(finding)
    assert judged("loss_spikes", recording([level] * steps)).status == "ok"


@given(st.floats(0.0, 0.9), st.floats(0.0, 0.9))
@settings(max_examples=25)
def test_less_of_a_fall_never_hides_it(one, other):
    loss = [np.linspace(1, 1 - fall, 100) for fall in sorted((one, other))]
    less, more = (judged("loss_not_decreasing", recording(line)).status == "fired" for line in loss)
    assert less >= more


def test_a_loss_that_comes_back_does_not_decrease():
    loss = [*falling(200), *[2.3] * 200]
    assert judged("loss_not_decreasing", recording(loss)).first_step > 150


def test_answering_with_the_shares_of_classes_is_not_learning():
    """Weights too large begin with a loss of 40: that it comes down to that of guessing is no learning."""
    loss = [*np.geomspace(40, 2.3, 30), *[2.3] * 100]
    assert judged("loss_not_decreasing", recording(loss)).status == "ok"
    assert judged("loss_not_decreasing", recording(loss, data=VAL)).status == "fired"


def test_a_rest_high_up_is_a_stall():
    loss = np.concatenate([np.linspace(2.3, 1.2, 50), np.full(200, 1.2)])
    loss += np.random.default_rng(0).normal(0, 0.02, len(loss))
    finding = judged("stalled", recording(loss))
    assert finding.status == "fired" and finding.first_step == 151
    check_remedy(finding)


def test_a_rest_after_the_rate_was_annealed_is_none():
    loss = np.concatenate([np.linspace(2.3, 1.2, 100), np.full(150, 1.2)])
    rate = np.concatenate([np.full(100, 1e-3), np.full(150, 1e-5)])
    assert judged("stalled", recording(loss, rate=rate)).status == "ok"


def test_label_smoothing_leaves_a_loss_that_is_no_stall():
    """0.05 of it, ten classes: no network gets below 0.29."""
    loss = np.concatenate([np.linspace(2.3, 0.35, 50), np.full(200, 0.35)])
    assert judged("stalled", recording(loss, trainer__label_smoothing=0.05)).status == "ok"
    assert judged("stalled", recording(loss)).status == "fired"


@given(st.integers(30, 390), st.floats(2.5, 1e6))
@settings(max_examples=25)
def test_a_spike_is_found_where_it_is(at, height):
    loss = falling()
    loss[at] = height
    finding = judged("loss_spikes", recording(loss))
    assert finding.status == "fired" and finding.first_step == at + 1
    check_remedy(finding)


def test_one_hard_image_in_a_small_batch_is_no_spike():
    loss = falling()
    loss[300] = 5.0
    assert judged("loss_spikes", recording(loss, trainer__batch_size=4)).status == "ok"


def test_a_loss_that_rises_for_good_diverged():
    loss = [*falling(200), *np.linspace(0.02, 3, 60), *[3.0] * 40]
    finding = judged("loss_spikes", recording(loss))
    assert finding.status == "fired" and 200 < finding.first_step < 260
    check_remedy(finding)


GOOD = [(0.3, 0.91, 0.31, 0.91), (0.1, 0.97, 0.11, 0.968), (0.05, 0.985, 0.07, 0.981), (0.04, 0.99, 0.06, 0.984)]


def test_nearly_perfect_is_not_overfitted():
    """Where the ratio of losses is 40."""
    rows = [*GOOD, (0.0005, 0.9999, 0.02, 0.996)]
    assert judged("overfitting", recording(falling(), epochs=rows, data=VAL)).status == "ok"


def test_a_gap_of_few_images_is_not_overfitting():
    few, many = answers(np.diag([12] * 10)), answers(np.diag([1200] * 10))
    rows = [*GOOD, (0.01, 1.0, 0.08, 0.9833)]
    assert judged("overfitting", recording(falling(), epochs=rows, data=few)).status == "ok"
    assert judged("overfitting", recording(falling(), epochs=rows, data=many)).status == "fired"


def test_a_gap_that_so_few_images_cannot_show_is_not_evaluated():
    fewest = answers(np.diag([3] * 10), counts=[100] * 10)
    wide, none = [*GOOD, (0.01, 1.0, 0.3, 28 / 30)], [*GOOD, (0.01, 1.0, 0.3, 1.0)]
    finding = judged("overfitting", recording(falling(), epochs=wide, data=fewest))
    assert finding.status == "not evaluated" and "30 images" in finding.explanation
    assert judged("overfitting", recording(falling(), epochs=none, data=fewest)).status == "ok"
    lost = [*GOOD, (0.01, 1.0, 3.0, 0.5)]
    assert judged("overfitting", recording(falling(), epochs=lost, data=fewest)).status == "fired"


@pytest.mark.parametrize(("images", "status"), [(144, "not evaluated"), (50_000, "fired"), (0, "ok")])
def test_what_is_learnt_of_few_images_is_not_told_from_enough(images, status):
    data = answers(np.diag([500] * 10), counts=[max(images, 100) // 10] * 10)
    row = (0.3, 0.8611, 0.3, 0.86) if images else (0.3, 0.91, 0.3, 0.9)
    assert judged("underfitting", recording(falling(), epochs=[row, row], data=data)).status == status


def test_a_validation_loss_past_its_turn_is_overfitting():
    rows = [*GOOD, (0.01, 0.997, 0.09, 0.991), (0.004, 0.999, 0.1, 0.991)]
    finding = judged("overfitting", recording(falling(), epochs=rows, data=VAL, planned=400))
    assert finding.status == "fired" and finding.first_step == 4 * 66
    assert finding.remedy["model.dropout"] == "both"
    check_remedy(finding)


@given(
    st.lists(
        st.tuples(st.floats(0.001, 2), st.floats(0, 1), st.floats(0.001, 2), st.floats(0, 1)),
        min_size=2,
        max_size=6,
    ),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
)
@settings(max_examples=25)
def test_a_wider_gap_never_hides_overfitting(rows, worse, up, known):
    data = VAL if known else None
    last = rows[-1]
    wider = (last[0], last[1], last[2] * (1 + up), last[3] * (1 - worse))
    before = judged("overfitting", recording(falling(60), epochs=rows, data=VAL))
    after = judged("overfitting", recording(falling(60), epochs=[*rows[:-1], wider], data=VAL))
    assert after.status == "fired" or before.status != "fired"
    # While it trains, the number of images is not known, and taken for no more than it is.
    live = judged("overfitting", recording(falling(60), epochs=rows, data=data))
    assert live.evidence["val images"] > 0


@pytest.mark.parametrize("images", [97, 360, 5000, 10_000])
def test_the_number_of_images_follows_from_accuracies(images):
    hits = np.random.default_rng(0).integers(images // 2, images, 6)
    rows = [(0.1, 0.9, 0.2, hit / images) for hit in hits]
    found = judged("overfitting", recording(falling(), epochs=rows)).evidence["val images"]
    assert images % found == 0 and found > 1


def test_going_on_after_the_best_epoch_is_overtraining():
    rows = [*GOOD, *[(0.02 / 2**i, 0.999, 0.07 + 0.01 * i, 0.984) for i in range(6)]]
    finding = judged("overtraining", recording(falling(), epochs=rows, data=VAL))
    assert finding.status == "fired" and finding.evidence["best epoch"] == 4
    assert finding.remedy["trainer.early_stopping"]["patience"] == 3
    check_remedy(finding)
    annealed = recording(falling(), epochs=rows, data=VAL, experiment="mnist")
    assert judged("overtraining", annealed).remedy == {"trainer.max_epochs": 4}


def test_resting_is_not_overtraining():
    rows = [*GOOD, *[GOOD[-1]] * 8]
    assert judged("overtraining", recording(falling(), epochs=rows, data=VAL)).status == "ok"


def test_a_training_that_is_not_over_is_not_underfitted():
    rows = [(1.5, 0.5, 1.5, 0.5)]
    assert judged("underfitting", recording(falling(), epochs=rows, planned=800)).status == "not evaluated"
    finding = judged("underfitting", recording(falling(), epochs=rows, planned=400))
    assert finding.status == "fired"
    check_remedy(finding)


def test_both_losses_falling_fast_at_the_end_is_underfitting():
    rows = [*GOOD[:3], (0.03, 0.986, 0.045, 0.983)]
    finding = judged("underfitting", recording(falling(), epochs=rows, data=VAL))
    assert finding.status == "fired" and finding.remedy == {"trainer.max_epochs": 20}
    annealed = recording(falling(), rate=np.linspace(1e-3, 0, 400), epochs=rows, data=VAL)
    assert judged("underfitting", annealed).status == "ok"


def test_one_epoch_of_large_batches_that_ended_too_early_is_underfitting():
    """As measured: 55 steps of batch 1,000; the losses of 1,719 steps of batch 32 lie even at the end."""
    random = np.random.default_rng(0)
    steep = 2.3 * np.arange(1, 56) ** -0.7 * random.lognormal(0, 0.05, 55)
    rows = [(0.13, 0.966, 0.14, 0.965)]
    large = {"experiment": "lab", "trainer__batch_size": 1000}
    finding = judged("underfitting", recording(steep, epochs=rows, data=VAL, **large))
    assert finding.status == "fired" and finding.remedy == {"trainer.batch_size": 125}
    assert "55 updates" in finding.explanation
    even = [*falling(800), *(0.07 * random.lognormal(0, 0.5, 919))]
    rows = [(0.05, 0.985, 0.06, 0.982)]
    assert judged("underfitting", recording(even, epochs=rows, data=VAL, experiment="lab")).status == "ok"


@given(st.floats(5.0, 1e5), st.integers(1, 30))
@settings(max_examples=25)
def test_a_loss_that_shoots_up_means_a_rate_too_high(height, at):
    loss = falling()
    loss[at] = height
    finding = judged("learning_rate_too_high", recording(loss))
    assert finding.status == "fired" and finding.first_step == at + 1
    assert finding.remedy == {"optimizer.learning_rate": 1e-4}
    check_remedy(finding)


def test_a_steady_slow_fall_means_a_rate_too_low():
    finding = judged("learning_rate_too_low", recording(creeping()))
    assert finding.status == "fired" and finding.remedy == {"optimizer.learning_rate": 0.01}
    check_remedy(finding)
    assert judged("stalled", recording(creeping())).status == "ok"


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 20])
def test_a_healthy_training_that_is_not_over_has_no_rate_too_low(epochs):
    """Twenty epochs of 30 steps whose loss falls exponentially: of each part, as it is judged while it trains."""
    noise = np.random.default_rng(0).lognormal(0, 0.03, 600)
    loss = 4.9 * (0.02 + 0.98 * np.exp(-np.arange(600) / 100)) * noise
    finding = judged("learning_rate_too_low", recording(loss[: 30 * epochs], planned=600))
    assert finding.status == ("not evaluated" if epochs < 4 else "ok")


def test_a_loss_at_rest_does_not_mean_a_rate_too_low():
    assert judged("learning_rate_too_low", recording([*np.linspace(2.3, 1.5, 40), *[1.5] * 160])).status == "ok"


def range_test(best: float) -> Sweep:
    """Return a range test whose loss falls most steeply a decade below `best`, where it is least."""
    rate = np.geomspace(1e-6, 10, 100)
    decades = np.log10(rate / best)
    loss = 2.3 - 1.8 / (1 + np.exp(-4 * (decades + 1))) + 3 * np.maximum(decades, 0) ** 2
    return Sweep(rate.astype(np.float32), loss.astype(np.float32))


def test_the_range_test_gives_the_rate():
    slow = replace(recording(creeping(), optimizer__learning_rate=1e-6), sweep=range_test(0.03))
    assert judged("learning_rate_too_low", slow).remedy["optimizer.learning_rate"] == pytest.approx(3e-3, rel=0.3)
    fast = replace(recording(falling(), optimizer__learning_rate=0.1), sweep=range_test(0.03))
    assert judged("learning_rate_too_high", fast).remedy["optimizer.learning_rate"] == pytest.approx(3e-3, rel=0.3)
    right = replace(recording(falling(), optimizer__learning_rate=3e-3), sweep=range_test(0.03))
    assert judged("learning_rate_too_high", right).status == judged("learning_rate_too_low", right).status == "ok"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("dropout", ["none", "conv", "dense", "both"])
@pytest.mark.parametrize("augment", [0.0, 0.1])
def test_every_remedy_changes_its_recipe(experiment, dropout, augment):
    """Of each rule, on each experiment: a patch that leaves all as it was would cure nothing."""
    changes = {"model__dropout": dropout, "augment__shift": augment}
    rows = [*GOOD, *[(0.02 / 2**i, 0.9999, 0.1 + 0.03 * i, 0.97) for i in range(6)]]
    base = recipe_of(experiment, **changes)
    common = {"experiment": experiment, **changes}
    broken = recording(falling(), **common)
    found = [
        judged("overfitting", recording(falling(), epochs=rows, data=VAL, **common)),
        judged("overtraining", recording(falling(), epochs=rows, data=VAL, **common)),
        judged("underfitting", recording(falling(), epochs=[(1.5, 0.5, 1.5, 0.5)], **common)),
        judged("loss_not_decreasing", recording([2.3] * 100, **common)),
        judged("stalled", recording([*np.linspace(2.3, 1.5, 40), *[1.5] * 160], **common)),
        judged("loss_spikes", recording([*falling(200), *[9.0] * 50], **common)),
        judged("learning_rate_too_high", recording([2.3, 40, *falling()], **common)),
        judged("learning_rate_too_low", recording(creeping(), **common)),
        judged("not_finite", replace(broken, curves=replace(broken.curves, not_finite_step=7))),
    ]
    for finding in found:
        assert finding.status == "fired", finding
        check_remedy(finding)
        names = {name for name in finding.remedy if base.get(name) == finding.remedy[name]}
        assert finding.remedy and not names, finding


def trained(packed, tmp_path, *overrides: str):
    recipe = recipe_with(list(overrides))
    recorder = Recorder(tensors=False)
    fit(recipe, packed, state_folder=tmp_path / "state", callbacks=[recorder], brief=True)
    return recorder.recording(recipe)


def test_a_short_training_that_goes_well_is_ok(packed, tmp_path):
    seen = trained(packed, tmp_path)
    status = {rule: judged(rule, seen).status for rule in (*STEP_RULES, *EPOCH_RULES)}
    assert status == {
        **dict.fromkeys((*STEP_RULES, "overfitting", "underfitting"), "ok"),
        "overtraining": "not evaluated",
    }


def test_a_real_rate_that_is_too_high_or_too_low_is_found(packed, tmp_path):
    high = trained(packed, tmp_path / "high", "optimizer.learning_rate=3.0")
    assert judged("learning_rate_too_high", high).status == "fired"
    low = trained(packed, tmp_path / "low", "optimizer.learning_rate=1e-5", "schedule=constant")
    assert judged("learning_rate_too_low", low).status == "fired"
    assert judged("learning_rate_too_high", low).status == judged("learning_rate_too_low", high).status == "ok"
