"""Rules on gradients, weights and activations: on made-up statistics, and on trainings that are really sick."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT
from training_recipes import CONF

from cnn_tuning.config import Recipe, compose, flatten, patch, select, to_plain
from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.probe import PER_LAYER
from cnn_tuning.diagnosis.recording import Curves, Recording, Tensors
from cnn_tuning.diagnosis.rules import RULES

sys.path.append(str(ROOT / "bench"))
sickness = importlib.import_module("sickness")

CONFIG = compose(["experiment=digits", "model=plain_cnn"], params=None, conf=CONF)
RECIPE = select(Recipe, CONFIG)
NAMES = [
    "poor_initialisation",
    "vanishing_gradients",
    "exploding_gradients",
    "dead_relus",
    "saturated_activations",
    "update_ratio",
    "unchanged_weights",
    "zero_tensors",
]
LAYERS = ("first", "second", "third", "last")


def table(values: list[float], samples: int, columns: int) -> np.ndarray:
    return np.tile(np.array(values[:columns], np.float32), (samples, 1))


def healthy(samples: int = 12) -> Tensors:
    """Return statistics of a network in good health: four layers, two ReLUs and a tanh."""
    return Tensors(
        step=np.array([*range(1, min(samples, 10) + 1), *(10 + 8 * n for n in range(1, samples - 9))], np.int64),
        layers=LAYERS,
        weight_rms=table([0.4, 0.12, 0.12, 0.06], samples, 4),
        weight_zero=table([0, 0, 0, 0], samples, 4),
        gradient_rms=table([0.02, 0.02, 0.03, 0.04], samples, 4),
        gradient_mean=table([0.01, 0.01, 0.02, 0.02], samples, 4),
        gradient_zero=table([0, 0.1, 0.2, 0.2], samples, 4),
        output_variance=table([1.4, 1.3, 1.6, 0.4], samples, 4),
        update_ratio=table([0.002, 0.006, 0.006, 0.01], samples, 4),
        trainable=np.ones(4, np.int64),
        changed=np.array([0.2, 0.7, 0.6, 1.5], np.float32),
        activations=("relu 1", "relu 2", "tanh 3"),
        kinds=("ReLU", "ReLU", "Tanh"),
        active=table([0.5, 0.4, np.nan], samples, 3),
        dead=table([0.0, 0.2, np.nan], samples, 3),
        saturated=table([np.nan, np.nan, 0.1], samples, 3),
    )


def changed(column: int | None = None, samples: int = 12, **values: float) -> Tensors:
    """Return healthy statistics with values put into one column (None: all) at all samples."""
    tensors = healthy(samples)
    arrays = {name: getattr(tensors, name).copy() for name in values}
    for name, value in values.items():
        arrays[name][..., slice(None) if column is None else column] = value
    return dataclasses.replace(tensors, **arrays)


def record(tensors: Tensors | None, of: Recipe = RECIPE, **recipe: object) -> Recording:
    steps = 0 if tensors is None else int(tensors.step[-1])
    loss = np.linspace(2.3, 1.0, steps).astype(np.float32)
    nothing = np.empty(0, np.float32)
    curves = Curves(loss, np.full(steps, 0.003), np.empty(0, np.int64), *[nothing] * 4, 20, steps)
    return Recording({**flatten(to_plain(of)), **recipe}, curves, tensors)


def ask(name: str, tensors: Tensors | None, of: Recipe = RECIPE, **recipe: object) -> Finding:
    return RULES[name](record(tensors, of, **recipe), **CONFIG.diagnosis.rules[name].thresholds)


def fires(name: str, tensors: Tensors) -> bool:
    return ask(name, tensors).status == "fired"


SICK: dict[str, tuple[str, Tensors, str]] = {
    "fading signal": ("poor_initialisation", changed(3, output_variance=1e-9), "last"),
    "growing signal": ("poor_initialisation", changed(2, output_variance=1e5), "third"),
    "no signal at all": ("poor_initialisation", changed(output_variance=0.0), "0 in all layers"),
    "fading gradient": ("poor_initialisation", changed(0, gradient_rms=1e-6), "first"),
    "small gradient": ("vanishing_gradients", changed(0, gradient_mean=1e-9, gradient_rms=1e-9), "first"),
    "small against others": ("vanishing_gradients", changed(1, gradient_mean=1e-6, gradient_rms=1e-6), "second"),
    "large gradient": ("exploding_gradients", changed(3, gradient_rms=9.0), "last"),
    "endless gradient": ("exploding_gradients", changed(1, gradient_rms=np.inf), "second"),
    "dead units": ("dead_relus", changed(1, dead=0.8), "relu 2"),
    "saturated": ("saturated_activations", changed(2, saturated=0.9), "tanh 3"),
    "large updates": ("update_ratio", changed(2, update_ratio=0.5), "third"),
    "tiny updates": ("update_ratio", changed(update_ratio=1e-7), "fastest layer"),
    "unmoved": ("unchanged_weights", changed(1, changed=1e-7), "second"),
    "moved by decay only": ("unchanged_weights", changed(2, gradient_rms=0.0, gradient_mean=0.0), "third"),
    "zero weights": ("zero_tensors", changed(0, weight_zero=1.0), "weights of first"),
    "zero gradient": ("zero_tensors", changed(3, gradient_zero=1.0), "gradients of last"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_healthy_network_is_ok_and_nothing_recorded_is_not_evaluated(name):
    assert ask(name, healthy()).status == "ok"
    assert ask(name, None).status == "not evaluated"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "poor_initialisation"])
def test_four_samples_are_too_few(name):
    sick = next(tensors for rule, tensors, _ in SICK.values() if rule == name)
    first = {f: getattr(sick, f)[:4] for f in ("step", *PER_LAYER, "active", "dead", "saturated")}
    assert ask(name, dataclasses.replace(sick, **first)).status == "not evaluated"


def test_a_start_that_was_not_seen_is_not_judged():
    late = changed(3, output_variance=1e-9)
    assert ask("poor_initialisation", dataclasses.replace(late, step=late.step + 5)).status == "not evaluated"


@pytest.mark.parametrize("kind", SICK)
def test_a_sick_network_is_found_with_its_layer_numbers_and_a_remedy(kind):
    rule, tensors, named = SICK[kind]
    finding = ask(rule, tensors)
    assert finding.status == "fired"
    assert named in finding.explanation
    assert finding.advice and finding.first_step == 1
    assert finding.evidence
    json.dumps(dataclasses.asdict(finding), allow_nan=False)
    patch(RECIPE, finding.remedy)


@pytest.mark.parametrize("kind", SICK)
def test_of_the_other_rules_only_those_of_the_same_matter_fire(kind):
    rule, tensors, _ = SICK[kind]
    # A gradient that is small is small at the start, too.
    related = {"vanishing_gradients": {"poor_initialisation"}, "poor_initialisation": {"vanishing_gradients"}}
    related |= {"unchanged_weights": {"poor_initialisation"}, "exploding_gradients": {"poor_initialisation"}}
    others = {name for name in NAMES if fires(name, tensors)} - {rule}
    assert others <= related.get(rule, set())


@pytest.mark.parametrize(
    ("rule", "tensors", "recipe", "remedy"),
    [
        ("dead_relus", changed(1, dead=0.8), {"model.arguments.initial_bias": -5.0}, {"initial_bias": 0.0}),
        ("poor_initialisation", changed(3, output_variance=1e9), {"model.arguments.initial_scale": 3.0},
         {"initial_scale": 1.0}),
        ("vanishing_gradients", changed(0, gradient_mean=1e-9), {"model.arguments.activation": "sigmoid"},
         {"normalisation": True, "activation": "relu"}),
    ],
)  # fmt: skip
def test_a_remedy_changes_what_the_recipe_has_wrong(rule, tensors, recipe, remedy):
    assert ask(rule, tensors, **recipe).remedy == {f"model.arguments.{k}": v for k, v in remedy.items()}


# Units dead from the start, weights and gradients of 0: no value of the configuration helps.
BY_HAND = {"dead units", "saturated", "moved by decay only", "zero gradient", "zero weights"}


@pytest.mark.parametrize("experiment", ["mnist", "lab", "cifar10", "chess"])
@pytest.mark.parametrize("kind", SICK)
def test_a_network_without_such_arguments_gets_a_patch_that_it_bears_or_a_word(experiment, kind):
    rule, tensors, _ = SICK[kind]
    plain = select(Recipe, compose([f"experiment={experiment}"], params=None, conf=CONF))
    finding = ask(rule, tensors, plain)
    assert finding.status == "fired"
    assert patch(plain, finding.remedy) != plain or not finding.remedy
    assert not any(name.startswith("model.arguments") for name in finding.remedy)
    if not finding.remedy:
        small = kind.startswith("small") and plain.optimizer.name != "sgd"
        assert kind in BY_HAND or kind == "unmoved" or small
        assert "look for" in finding.advice or "in the network's code" in finding.advice


def test_what_began_after_the_first_update_calls_for_a_lower_rate():
    lab = select(Recipe, compose(["experiment=lab"], params=None, conf=CONF))
    for rule, name in (("saturated_activations", "saturated"), ("zero_tensors", "gradient_zero")):
        tensors = changed(2, **{name: 1.0})
        getattr(tensors, name)[:1, 2] = 0.1
        assert ask(rule, tensors, lab).remedy == {"optimizer.learning_rate": 1e-4}


def test_units_that_died_on_the_way_call_for_a_lower_rate():
    tensors = healthy()
    dead = tensors.dead.copy()
    dead[6:, 0] = 0.9
    finding = ask("dead_relus", dataclasses.replace(tensors, dead=dead), **{"optimizer.learning_rate": 0.3})
    assert finding.first_step == tensors.step[6]
    assert finding.remedy == {"optimizer.learning_rate": 0.03}


def test_units_that_came_to_life_again_are_no_finding():
    tensors = healthy()
    dead = tensors.dead.copy()
    dead[:8, 0] = 0.9
    assert ask("dead_relus", dataclasses.replace(tensors, dead=dead)).status == "ok"


def test_clipped_gradients_are_said_to_be_and_are_no_finding():
    finding = ask("exploding_gradients", changed(3, gradient_rms=9.0), **{"trainer.gradient_clip": 1.0})
    assert finding.status == "ok"
    assert "clipped" in finding.explanation


@pytest.mark.parametrize(("times", "status"), [(2, "ok"), (3, "fired")])
@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [("exploding_gradients", "gradient_rms", 50.0), ("update_ratio", "update_ratio", 0.9)],
)
def test_one_or_two_large_steps_are_forgiven(rule, name, value, times, status):
    tensors = healthy()
    values = getattr(tensors, name).copy()
    values[:times, 1] = value
    assert ask(rule, dataclasses.replace(tensors, **{name: values})).status == status


def test_gradients_may_be_small_once_all_is_learnt():
    small = changed(gradient_mean=1e-9, gradient_rms=1e-9)
    recording = record(small)
    loss = recording.curves.loss.copy()
    assert RULES["vanishing_gradients"](recording, floor=1e-7, spread=1e-3, learnt=0.1).status == "fired"
    loss[6:] = 0.01
    learnt = dataclasses.replace(recording, curves=dataclasses.replace(recording.curves, loss=loss))
    late = dataclasses.replace(small, gradient_mean=small.gradient_mean.copy())
    late.gradient_mean[:6], late.gradient_rms[:] = 0.01, 0.01
    recording = dataclasses.replace(learnt, tensors=late)
    assert RULES["vanishing_gradients"](recording, floor=1e-7, spread=1e-3, learnt=0.1).status == "ok"


def test_a_rate_that_moved_the_weights_before_it_was_lowered_is_not_too_low():
    tensors = changed(update_ratio=1e-12)
    tensors.update_ratio[:10] = 0.005
    assert ask("update_ratio", tensors).status == "ok"


def test_frozen_layers_are_no_finding():
    """A frozen layer has no gradient, does not change and may be all zeros in its gradient's place."""
    tensors = changed(0, gradient_rms=np.nan, gradient_mean=np.nan, gradient_zero=np.nan, update_ratio=0.0)
    tensors = dataclasses.replace(tensors, trainable=np.array([0, 1, 1, 1]))
    tensors.changed[0] = 0
    assert not [name for name in NAMES if fires(name, tensors)]


def test_a_stage_that_was_freed_on_the_way_is_no_finding():
    """While it was frozen its gradient was not measured, and no sample may have come since."""
    tensors = changed(0, gradient_rms=np.nan, gradient_mean=np.nan, gradient_zero=np.nan)
    assert ask("unchanged_weights", tensors).status == "ok"
    tensors.gradient_rms[-2:, 0] = 0.01
    assert ask("unchanged_weights", tensors).status == "ok"
    tensors.gradient_rms[-2:, 0] = 0.0
    assert ask("unchanged_weights", tensors).evidence["without a gradient"] == ["first"]


def test_a_layer_that_is_cut_off_is_said_to_get_no_gradient():
    tensors = changed(0, gradient_rms=np.nan, gradient_mean=np.nan, gradient_zero=np.nan, changed=0.0)
    assert ask("unchanged_weights", tensors).evidence["without a gradient"] == ["first"]


def test_of_a_compiled_network_only_gradients_tell_of_its_start():
    unseen = ask("poor_initialisation", changed(output_variance=np.nan))
    assert unseen.status == "ok" and "was not seen" in unseen.explanation
    assert "variance ratio" not in unseen.evidence
    assert ask("poor_initialisation", changed(output_variance=np.nan, gradient_rms=np.nan)).status == (
        "not evaluated"
    )


def test_weights_that_began_at_zero_and_moved_are_not_unchanged():
    moved, still = changed(1, changed=np.nan), changed(1, changed=np.nan)
    assert ask("unchanged_weights", moved).status == "ok"
    still.weight_rms[:, 1] = 0
    assert ask("unchanged_weights", still).status == "fired"


def test_a_sample_stands_for_the_steps_up_to_the_next():
    """Ten samples of the first steps outvote two only where they stand for more steps."""
    tensors = healthy(12)
    tensors.saturated[:10, 2], tensors.saturated[10:, 2] = 0.9, 0.1
    steps = np.array([*range(1, 11), 100, 150])
    assert ask("saturated_activations", dataclasses.replace(tensors, step=steps)).status == "fired"
    steps = np.array([*range(1, 11), 11, 200])
    assert ask("saturated_activations", dataclasses.replace(tensors, step=steps)).status == "ok"


# A column, and two values of which the second is the worse one.
worse = st.tuples(st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)).map(lambda t: (t[0], *sorted(t[1:])))


@given(worse)
def test_worse_never_unfires(case):
    column, less, more = case
    unit = column % 2
    for rule, mild, severe in [
        ("dead_relus", changed(unit, dead=less), changed(unit, dead=more)),
        ("saturated_activations", changed(2, saturated=less), changed(2, saturated=more)),
        ("update_ratio", changed(column, update_ratio=less), changed(column, update_ratio=more)),
        ("exploding_gradients", changed(column, gradient_rms=20 * less), changed(column, gradient_rms=20 * more)),
        ("unchanged_weights", changed(column, changed=1e-4 * more), changed(column, changed=1e-4 * less)),
        ("zero_tensors", changed(column, gradient_zero=less), changed(column, gradient_zero=more)),
        ("zero_tensors", changed(column, weight_zero=less), changed(column, weight_zero=more)),
    ]:
        assert not fires(rule, mild) or fires(rule, severe) or less == 0, rule


@given(st.integers(0, 3), st.floats(1e-12, 1.0), st.floats(0, 1.0))
def test_less_gradient_never_unfires_and_none_is_zero_tensors(column, value, share):
    def of(value: float) -> Tensors:
        size = float(np.float32(value))
        return changed(column, gradient_mean=size, gradient_rms=size, gradient_zero=float(size == 0))

    if fires("vanishing_gradients", of(value)):
        smaller = of(value * share)
        assert fires("vanishing_gradients", smaller) or fires("zero_tensors", smaller)


@given(st.sampled_from(list(SICK)), st.permutations(range(4)))
def test_the_order_of_layers_changes_no_status(kind, order):
    _, tensors, _ = SICK[kind]
    columns = {name: getattr(tensors, name)[:, order] for name in PER_LAYER}
    moved = dataclasses.replace(tensors, **columns, changed=tensors.changed[order])
    for name in NAMES:
        assert ask(name, moved).status == ask(name, tensors).status


@given(st.floats(1e-3, 1e3))
def test_scales_that_mean_nothing_change_no_status(scale):
    """All outputs alike; weights with their gradients and outputs; gradients together, while not tiny."""
    for kind in ("fading signal", "growing signal"):
        tensors = SICK[kind][1]
        scaled = dataclasses.replace(tensors, output_variance=tensors.output_variance * scale)
        assert fires("poor_initialisation", scaled)
    for tensors in (healthy(), SICK["large gradient"][1]):
        scaled = dataclasses.replace(
            tensors, weight_rms=tensors.weight_rms * scale, gradient_rms=tensors.gradient_rms * scale
        )
        assert fires("exploding_gradients", scaled) == fires("exploding_gradients", tensors)
    tensors = healthy()
    scaled = dataclasses.replace(
        tensors, gradient_rms=tensors.gradient_rms * scale, gradient_mean=tensors.gradient_mean * scale
    )
    assert ask("vanishing_gradients", scaled).status == "ok"


def wild(seed: int) -> Tensors:
    """Return statistics that no network gives, with gaps and infinities."""
    random = np.random.default_rng(seed)
    samples, layers, activations = random.integers(1, 10), random.integers(0, 4), random.integers(0, 4)

    def values(*shape: int) -> np.ndarray:
        sizes = np.float32(10.0) ** random.uniform(-40, 30, shape).astype(np.float32)
        special = random.choice([0.0, 0.5, 1.0, np.nan, np.inf], shape)
        return np.where(random.random(shape) < random.random(), special, sizes).astype(np.float32)

    return Tensors(
        step=random.integers(1, 9, samples).cumsum(),
        layers=LAYERS[:layers],
        **{name: values(samples, layers) for name in PER_LAYER},
        trainable=random.integers(0, 2, layers),
        changed=values(layers),
        activations=("a", "b", "c")[:activations],
        kinds=("ReLU", "Tanh", "Sigmoid")[:activations],
        active=values(samples, activations),
        dead=values(samples, activations),
        saturated=values(samples, activations),
    )


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_whatever_was_recorded_the_answer_is_whole(seed):
    tensors = wild(seed)
    for name in NAMES:
        finding = ask(name, tensors)
        assert finding.rule == name and finding.explanation
        assert (finding.status == "fired") == (finding.first_step is not None)
        if finding.remedy:
            patch(RECIPE, finding.remedy)


REAL = ["weights too large", "deep sigmoids", "units dead from the start", "saturated tanh"]
CASES = {case.name: case for case in (*sickness.SICK, *sickness.HEALTHY)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the data of all cases are made once."""
    return tmp_path_factory.mktemp("sickness")


@pytest.mark.parametrize("name", REAL)
def test_a_training_that_is_really_sick_is_found_and_its_remedy_is_valid(name, folder):
    findings = {finding.rule: finding for finding in sickness.train(CASES[name], 0, folder)}
    for rule in CASES[name].sick & set(NAMES):
        assert findings[rule].status == "fired", rule
        patch(sickness.recipe_of(CASES[name], 0)[0], findings[rule].remedy)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in REAL])
def test_every_sickness_is_found_and_no_healthy_training_has_one(name, folder):
    case = CASES[name]
    fired = {finding.rule for finding in sickness.train(case, 0, folder) if finding.status == "fired"}
    assert case.sick <= fired
    assert not (fired & set(NAMES) if case.sick else fired) - case.sick - case.also
