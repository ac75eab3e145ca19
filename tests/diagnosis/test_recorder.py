"""The recorder: changes nothing, measures what it says, goes on after an interruption, names what broke."""

from __future__ import annotations

import copy

import backbones
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch import nn
from training_recipes import SHORT, SignalAt, recipe_with, same

from cnn_tuning.config import flatten, patch, to_plain
from cnn_tuning.diagnosis.probe import Probe
from cnn_tuning.diagnosis.recorder import Recorder, next_sample
from cnn_tuning.diagnosis.recording import write_part
from cnn_tuning.training.fit import Diverged, fit
from cnn_tuning.training.resume import Interrupted

STEPS_OF_AN_EPOCH = 21
SETTINGS = {
    "augmented, with dropout": SHORT,
    "averaged, clipped, bf16": {
        "trainer.max_epochs": 2,
        "trainer.ema_decay": 0.9,
        "trainer.gradient_clip": 1.0,
        "trainer.precision": "bf16",
        "trainer.channels_last": False,
    },
}
LAB = {"model.name": "lab_cnn", "model.architecture": "lab_cnn", "model.arguments": {}, "trainer.max_epochs": 1}


class AtStep(Callback):
    """Does something to the network before the update of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.step:
            self.action(pl_module.network)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_recording_changes_no_bit_and_is_whole(packed, recipe, tmp_path, settings):
    recorder, chosen = Recorder(), patch(recipe, settings)
    plain = fit(chosen, packed, state_folder=tmp_path / "plain")
    recorded = fit(chosen, packed, state_folder=tmp_path / "recorded", callbacks=[recorder])
    assert same(plain.network, recorded.network)
    assert plain.history == recorded.history

    curves, tensors = recorder.curves(), recorder.tensors()
    assert len(curves.loss) == len(curves.learning_rate) == curves.planned_steps == 2 * STEPS_OF_AN_EPOCH
    assert curves.loss[-5:].mean() < 0.5 * curves.loss[0]
    assert curves.learning_rate.max() == pytest.approx(chosen.optimizer.learning_rate, rel=0.02)
    assert curves.epoch_step.tolist() == [row["step"] for row in plain.history]
    np.testing.assert_allclose(curves.val_accuracy, [row["val/accuracy"] for row in plain.history], rtol=1e-6)
    assert (curves.not_finite, curves.not_finite_step) == ("", -1)

    assert tensors.step.tolist() == [*range(1, 11), 15, 22, 33]
    assert tensors.layers == ("0", "3", "6", "11", "16")
    assert tensors.kinds == ("ReLU",) * 4
    assert tensors.trainable.all()
    for values in (tensors.gradient_rms, tensors.gradient_mean, tensors.update_ratio, tensors.output_variance):
        assert values.shape == (13, 5)
        assert (values > 0).all()
    assert (tensors.changed > 0.05).all()
    assert ((tensors.active > 0.2) & (tensors.active < 0.8)).all()


def test_a_resumed_recording_equals_an_uninterrupted_one(packed, recipe, tmp_path):
    chosen = patch(recipe, SHORT)
    whole, cut, rest = Recorder(), Recorder(), Recorder()
    expected = fit(chosen, packed, state_folder=tmp_path / "whole", callbacks=[whole])
    for step in (12, 25):
        with pytest.raises(Interrupted):
            fit(chosen, packed, state_folder=tmp_path / "cut", callbacks=[cut, SignalAt(step)])
        assert len(cut.curves().loss) == step
    fitted = fit(chosen, packed, state_folder=tmp_path / "cut", callbacks=[rest])
    assert same(fitted.network, expected.network)
    for name in ("curves", "tensors"):
        one, two = tmp_path / f"{name}-1.npz", tmp_path / f"{name}-2.npz"
        write_part(one, getattr(whole, name)())
        write_part(two, getattr(rest, name)())
        assert one.read_bytes() == two.read_bytes()


def test_the_first_step_of_stages_that_are_freed_is_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = backbones.pictures(tmp_path / "colours", train=48, val=24)
    recipe = backbones.pretrained_recipe(tmp_path, "trainer.batch_size=4", "trainer.max_epochs=3")
    recipe = patch(recipe, {"trainer.finetune": {"trainable": "gradual"}, "augment.flip": True})
    whole, cut, rest = Recorder(), Recorder(), Recorder()
    fit(recipe, data, state_folder=tmp_path / "whole", callbacks=[whole])
    tensors = whole.tensors()
    assert tensors.step.tolist() == [*range(1, 11), 13, 15, 22, 25, 33]
    freed = [name.startswith("trunk.layer4") for name in tensors.layers]
    seen = ~np.isnan(tensors.gradient_rms[:, freed]).any(axis=1)
    assert tensors.step[seen][0] == 13
    with pytest.raises(Interrupted):
        fit(recipe, data, state_folder=tmp_path / "cut", callbacks=[cut, SignalAt(12)])
    fit(recipe, data, state_folder=tmp_path / "cut", callbacks=[rest])
    assert rest.tensors().step.tolist() == tensors.step.tolist()


def test_steps_before_the_recording_began_are_not_taken_for_broken_ones(packed, recipe, tmp_path):
    with pytest.raises(Interrupted):
        fit(patch(recipe, SHORT), packed, state_folder=tmp_path, callbacks=[SignalAt(12)])
    recorder = Recorder()
    fit(patch(recipe, SHORT), packed, state_folder=tmp_path, callbacks=[recorder])
    curves, tensors = recorder.curves(), recorder.tensors()
    assert np.isnan(curves.loss).tolist() == [True] * 12 + [False] * 30
    assert curves.not_finite_step == -1
    assert tensors.step.tolist() == [15, 22, 33]


def test_a_recorder_begins_anew_with_each_fit_and_may_keep_to_curves(packed, recipe, tmp_path):
    recorder, short = Recorder(tensors=False), patch(recipe, SHORT | {"trainer.max_epochs": 1})
    for name in "ab":
        fit(short, packed, state_folder=tmp_path / name, callbacks=[recorder])
        recording = recorder.recording(short)
        assert len(recording.curves.loss) == STEPS_OF_AN_EPOCH
        assert recording.tensors is None
    assert recording.recipe == flatten(to_plain(short))


def test_statistics_are_those_of_the_step(packed, recipe, tmp_path):
    """All layers' figures at the second step, against torch's own functions on copies taken in it."""
    seen = {}

    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                # Clones in each hook: the ReLUs work in place.
                network, seen["out"] = copy.deepcopy(pl_module.network), {}
                for name, layer in network.named_modules():
                    layer.register_forward_hook(
                        lambda _, __, out, name=name: seen["out"].update({name: out.clone()})
                    )
                network(batch[0])

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                named = dict(pl_module.network.body.named_parameters())
                seen["weights"] = {name: p.detach().clone() for name, p in named.items()}
                seen["gradients"] = {name: p.grad.clone() for name, p in named.items()}

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                named = pl_module.network.body.named_parameters()
                seen["after"] = {name: p.detach().clone() for name, p in named}

    recorder = Recorder()
    chosen = patch(recipe, {"trainer.max_epochs": 1, "trainer.gradient_clip": 0.01})
    fit(chosen, packed, state_folder=tmp_path, callbacks=[recorder, Spy()])
    tensors = recorder.tensors()
    for index, name in enumerate(tensors.layers):
        weight, gradient = seen["weights"][f"{name}.weight"], seen["gradients"][f"{name}.weight"]
        expected = {
            "weight_rms": weight.square().mean().sqrt(),
            "weight_zero": (weight == 0).double().mean(),
            "gradient_rms": gradient.square().mean().sqrt(),
            "gradient_mean": gradient.abs().mean(),
            "gradient_zero": (gradient == 0).double().mean(),
            "output_variance": seen["out"][f"body.{name}"].var(correction=0),
            "update_ratio": (seen["after"][f"{name}.weight"] - weight).norm() / weight.norm(),
        }
        measured = {key: getattr(tensors, key)[1, index] for key in expected}
        assert measured == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-4)
    for index, name in enumerate(tensors.activations):
        out = seen["out"][f"body.{name}"]
        assert tensors.active[1, index] == pytest.approx(float((out > 0).double().mean()), rel=1e-4)


def test_units_that_never_fire_are_dead(packed, recipe, tmp_path):
    def kill_half(network):
        with torch.no_grad():
            network.body[0].bias[:16] = -1e3

    recorder = Recorder()
    fit(patch(recipe, LAB), packed, state_folder=tmp_path, callbacks=[recorder, AtStep(1, kill_half)])
    tensors = recorder.tensors()
    assert (tensors.dead[0, 0], tensors.dead[-1, 0]) == (0, 0.5)
    assert tensors.active[-1, 0] < 0.5 < tensors.active[0, 0] + 0.2


def test_activations_of_all_kinds_are_measured_where_it_means_something():
    torch.manual_seed(0)
    kinds = (nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ReLU6, nn.GELU)
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind())]
    network = nn.Sequential(*layers)
    with torch.no_grad():
        network[0].bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0]))  # half of the sigmoids at their upper bound
        network[6].bias.copy_(torch.tensor([-99.0, -99, 99, 99, 3, 3]))  # of ReLU6 a third dead, a third at 6
    network[8].weight.requires_grad_(False)
    probe = Probe(network, hooked=True)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    probe.begin(1)
    network(torch.randn(40, 6)).square().mean().backward()
    probe.gradients(scale=2.0)
    optimizer.step()
    probe.end()
    probe.collect()
    probe.compare()
    tensors = probe.tensors()
    assert tensors.kinds == tuple(kind.__name__ for kind in kinds)
    assert np.isnan(tensors.active[0]).tolist() == [True, True, False, False, False]
    assert np.isnan(tensors.dead[0]).tolist() == [True, True, True, False, True]
    assert np.isnan(tensors.saturated[0]).tolist() == [False, False, True, False, True]
    assert tensors.saturated[0, 0] == pytest.approx(0.5)
    assert tensors.saturated[0, 3] == pytest.approx(1 / 3)
    assert tensors.dead[0, 3] == pytest.approx(1 / 3)
    rms = network[0].weight.grad.square().mean().sqrt()
    assert tensors.gradient_rms[0, 0] == pytest.approx(float(rms) / 2)
    # A frozen layer has no gradient, and stays.
    assert tensors.trainable.tolist() == [1, 1, 1, 1, 0]
    assert np.isnan(tensors.gradient_rms[0]).tolist() == [False, False, False, False, True]
    assert tensors.update_ratio[0, 4] == tensors.changed[4] == 0
    assert (tensors.changed[:4] > 0).all()
    assert not any(module._forward_hooks for module in network.modules())


def test_of_a_large_layer_rows_and_columns_are_seen_alike():
    torch.manual_seed(0)
    layer = nn.Linear(512, 2048)
    with torch.no_grad():
        layer.weight[::2] = 0
        layer.weight[:, ::4] = 0
    exact = layer.weight.detach().clone()
    probe = Probe(nn.Sequential(layer), hooked=True)
    probe.begin(1)
    layer(torch.randn(8, 512)).sum().backward()
    probe.gradients()
    with torch.no_grad():
        layer.weight.mul_(0.75)
    probe.end()
    probe.collect()
    tensors = probe.tensors()
    assert tensors.weight_zero.item() == pytest.approx(1 - 1 / 2 * 3 / 4, abs=0.01)
    assert tensors.weight_rms.item() == pytest.approx(exact.square().mean().sqrt().item(), rel=0.01)
    assert tensors.gradient_mean.item() == pytest.approx(layer.weight.grad.abs().mean().item(), rel=0.05)
    assert tensors.update_ratio.item() == pytest.approx(0.25, rel=1e-3)


def infinite_gradient(network):
    network.body[3].weight.grad.fill_(torch.inf)


@pytest.mark.parametrize(
    ("settings", "callbacks", "part", "step"),
    [
        ({"optimizer.learning_rate": 1e30}, [], "output of 3 (Conv2d)", 2),
        ({"trainer.gradient_clip": 0.0}, [AtStep(13, infinite_gradient)], "gradient of 3 (Conv2d)", 13),
        # Found by the measuring after the last step, for which gradients are given up.
        ({"trainer.max_epochs": 1}, [AtStep(21, infinite_gradient)], "weights of 3 (Conv2d)", 21),
    ],
)
def test_what_broke_first_is_named(packed, recipe, tmp_path, settings, callbacks, part, step):
    recorder = Recorder()
    with pytest.raises(Diverged):
        fit(patch(recipe, SHORT | settings), packed, state_folder=tmp_path, callbacks=[recorder, *callbacks])
    curves = recorder.curves()
    assert (curves.not_finite, curves.not_finite_step) == (part, step)
    assert np.isfinite(curves.loss[: step - 1]).all()
    assert len(curves.learning_rate) == len(curves.loss)
    assert len(recorder.tensors().step) >= 1


@pytest.mark.slow
def test_a_compiled_network_shows_no_activations(packed, tmp_path):
    recorder = Recorder()
    compiled = recipe_with(["trainer.compile=true", "trainer.max_epochs=1"])
    fit(compiled, packed, state_folder=tmp_path, callbacks=[recorder])
    tensors = recorder.tensors()
    assert np.isnan(tensors.output_variance).all()
    assert np.isnan(tensors.active).all()
    assert (tensors.gradient_rms > 0).all()
    assert (tensors.update_ratio > 0).all()


@given(st.integers(0, 300_000))
def test_samples_follow_from_the_step_alone_and_grow_rare(step):
    following = next_sample(step)
    assert following > step
    for between in {step, (step + following) // 2, following - 1}:
        assert next_sample(between) == following
    gap = next_sample(following) - following
    if following >= 150:
        assert gap >= 64
        assert gap >= following // 64
    else:
        assert gap <= 64
