"""Backbones: names, heads, auxiliary logits and stages, of both libraries."""

from __future__ import annotations

import pytest
import torch
from backbones import recipe_of
from torch import nn
from training_recipes import CONF

from cnn_tuning.config import ImageConfig, compose, patch
from cnn_tuning.errors import UserError
from cnn_tuning.models import bundle
from cnn_tuning.models.backbone import Backbone, build
from cnn_tuning.models.network import build_network
from cnn_tuning.training.classifier import training_loss

NETWORKS = [("timm", "test_resnet", (3, 32, 32)), ("timm", "test_efficientnet", (1, 48, 32)),
            ("timm", "test_vit", (3, 64, 64)), ("timm", "test_convnext.r160_in1k", (3, 32, 32)),
            ("torchvision", "resnet18", (3, 32, 32)), ("torchvision", "mobilenet_v3_small", (3, 32, 32)),
            ("torchvision", "densenet121", (3, 32, 32))]  # fmt: skip


def made(library: str, name: str, shape: tuple[int, int, int], **more) -> Backbone:
    return build(shape, 5, conv_dropout=0.0, dense_dropout=0.0, library=library, name=name, **more)


@pytest.mark.parametrize(("library", "name", "shape"), NETWORKS)
@pytest.mark.parametrize("units", [None, 8])
def test_any_network_gets_a_new_head(library, name, shape, units):
    backbone = made(library, name, shape, units=units)
    assert backbone(torch.zeros(2, *shape)).shape == (2, 5)
    widths = [m.out_features for m in backbone.head if isinstance(m, nn.Linear)]
    assert widths == ([5] if units is None else [units, 5])
    assert not [m for m in backbone.modules() if isinstance(m, nn.Dropout) and m.p]
    stages = backbone.stages()
    inside = [name for stage in stages for name in stage]
    assert len(stages) > 2
    assert len(set(inside)) == len(inside)
    # Every weight of more than one dimension is in exactly one stage, but for tokens and positions.
    for place, parameter in backbone.trunk.named_parameters():
        owners = [name for name in inside if place.startswith(f"{name}.")]
        assert len(owners) == 1 or (not owners and "." not in place), (place, parameter.shape)


def test_stages_go_from_the_pictures_to_the_head():
    names = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    assert made("timm", "resnet18", (3, 32, 32)).stages() == names
    assert made("torchvision", "resnet18", (3, 32, 32)).stages() == names


@pytest.mark.parametrize(("arguments", "said"), [
    ({"name": "resnet5"}, "timm has no network 'resnet5'; did you mean 'resnet50'"),
    ({"library": "torchvision", "name": "vgg15"}, "torchvision has no network 'vgg15'; did you mean 'vgg1"),
    ({"library": "keras"}, "must be one of timm, torchvision"),
    ({"library": "torchvision", "name": "squeezenet1_1"}, "does not end in a dense layer"),
    ({"auxiliary": True}, "only torchvision's inception_v3 and googlenet"),
    ({"library": "torchvision", "name": "inception_v3", "auxiliary": True}, "need 299×299 pixels"),
    ({"name": "test_vit"}, "does not fit pictures"),
    ({"unit": 3}, "unit"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(arguments, said):
    model = compose(["model=resnet50"], params=None, conf=CONF).model
    model = patch(model, {"arguments": {**model.arguments, **arguments}})
    with pytest.raises(UserError, match=said) as caught:
        build_network(model, (3, 30, 30), 5, [0.5] * 3, [0.5] * 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "side", "wrapped"), [("resnet50", 64, False), ("convnext_tiny", 64, False),
                         ("efficientnet_lite0", 64, False), ("inception_v3", 299, True)])  # fmt: skip
def test_the_backbones_of_conf_train_and_answer(name, side, wrapped):
    model = compose([f"model={name}", "model.arguments.units=256"], params=None, conf=CONF).model
    network = build_network(model, (3, side, side), 7, [0.5] * 3, [0.5] * 3)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    answers = network(images)
    assert isinstance(answers, tuple) == wrapped
    loss = training_loss(answers, labels, 0.0)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())
    if wrapped:
        parts = [nn.functional.cross_entropy(logits, labels) for logits in answers]
        assert loss.item() == pytest.approx((parts[0] + 0.4 * parts[1]).item())
    with torch.no_grad():
        assert network.eval()(images).shape == (2, 7)


def test_a_bundle_of_a_pretrained_backbone_is_built_without_its_weights(tmp_path, monkeypatch):
    # No folder `models/pretrained`, no network: what a server has.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = patch(recipe_of().model, {"pretrained": True})
    image = ImageConfig(size=(32, 32), channels=3)
    spec = bundle.Specification("colours", model, ("a", "b"), image, (0.5,) * 3, (0.2,) * 3)
    network = spec.build().eval()
    bundle.save(tmp_path / "bundle", network, spec)
    again, spec_again = bundle.load(tmp_path / "bundle")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(again(images), network(images))
    assert spec_again == spec
