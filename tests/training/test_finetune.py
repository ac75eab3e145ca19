"""Fine-tuning: what is frozen stays, stages are freed in turn, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import backbones
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from training_recipes import SignalAt, same

from cnn_tuning.config import patch
from cnn_tuning.errors import UserError
from cnn_tuning.models.backbone import build
from cnn_tuning.training.finetune import Finetuning
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted
from cnn_tuning.training.start import first_network, specification_of

GRADUAL = {"trainer.finetune": {"trainable": "gradual", "layer_decay": 0.5}, "augment.flip": True}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return backbones.pictures(tmp_path_factory.mktemp("colours"), train=48, val=24)


class Snapshots(Callback):
    """The trunk's state after each epoch, and the rates of each group at each step."""

    def __init__(self):
        self.states, self.rates = [], []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_epoch_end(self, trainer, module):
        trunk = module.network.body.trunk
        self.states.append({name: tensor.clone() for name, tensor in trunk.state_dict().items()})


def test_stages_are_freed_one_an_epoch_from_the_head_on(here, data):
    recipe = patch(backbones.pretrained_recipe(here), GRADUAL | {"trainer.max_epochs": 4})
    start = first_network(specification_of(recipe, data.meta)).body.trunk.state_dict()
    seen = Snapshots()
    fit(recipe, data, state_folder=here / "state", callbacks=[seen])
    changed = []
    for state in seen.states:
        different = [name for name, tensor in state.items() if not torch.equal(tensor, start[name])]
        changed.append({name.partition(".")[0] for name in different})
    # Of a frozen stage neither weights nor the statistics of its normalisation have moved.
    assert changed == [set(), {"layer4"}, {"layer4", "layer3"}, {"layer4", "layer3", "layer2"}]
    shares = [rate / 0.01 for rate in seen.rates[0]]
    assert shares == pytest.approx([s for d in range(6) for s in (0.5**d, 0.5**d)])


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adamw", "constant"), ("adam", "cosine"), ("sgd", "one_cycle"), ("sgd", "step"), ("adamw", "plateau")],
)
def test_a_resumed_run_equals_the_uninterrupted_one(here, data, optimizer, schedule):
    recipe = backbones.pretrained_recipe(
        here, f"optimizer={optimizer}", f"schedule={schedule}", "optimizer.learning_rate=0.003"
    )
    recipe = patch(recipe, GRADUAL | {"trainer.ema_decay": 0.9, "trainer.gradient_clip": 1.0})
    whole = fit(recipe, data, state_folder=here / "whole")
    with pytest.raises(Interrupted):
        fit(recipe, data, state_folder=here / "cut", callbacks=[SignalAt(5)])
    assert same(fit(recipe, data, state_folder=here / "cut").network, whole.network)


def test_all_stages_learn_at_once_where_asked(here, data):
    recipe = patch(backbones.recipe_of(), {"trainer.finetune.trainable": "all", "trainer.max_epochs": 1})
    start = first_network(specification_of(recipe, data.meta)).body.trunk.state_dict()
    torch.manual_seed(recipe.seed)
    seen = Snapshots()
    fitted = fit(recipe, data, state_folder=here / "a", callbacks=[seen])
    moved = [name for name, tensor in seen.states[0].items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(start)
    # At one rate it is the training that a recipe without fine-tuning makes.
    plain = fit(patch(recipe, {"trainer.finetune": None}), data, state_folder=here / "b")
    for one, other in zip(fitted.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_auxiliary_branches_learn_with_the_head():
    backbone = build((3, 299, 299), 4, conv_dropout=0, dense_dropout=0, library="torchvision",
                     name="inception_v3", auxiliary=True)  # fmt: skip
    config = patch(backbones.recipe_of(), {"trainer.finetune": {"trainable": "gradual"}}).trainer.finetune
    tuning = Finetuning(backbone, config)
    assert not backbone.trunk.training
    tuning.begin_epoch(2)
    free = {name.split(".")[0] for name, p in backbone.trunk.named_parameters() if p.requires_grad}
    assert free == {"AuxLogits", "Mixed_7b", "Mixed_7c"}
    assert backbone.trunk.Mixed_7c.training
    assert not backbone.trunk.Mixed_7a.training
    counted = [id(p) for _, parameters in tuning.shares() for p in parameters]
    assert sorted(counted) == sorted(id(p) for p in backbone.parameters())


def test_what_does_not_go_together_is_said(here, data, packed, recipe):
    with pytest.raises(UserError, match=r"only for model.architecture backbone"):
        fit(patch(recipe, {"trainer.finetune.trainable": "head"}), packed, state_folder=here)
    grey = backbones.pretrained_recipe(here)
    with pytest.raises(UserError, match=r"set data.image.channels: 3"):
        fit(grey, packed, state_folder=here)
