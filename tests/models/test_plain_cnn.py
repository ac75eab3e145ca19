"""The plain network: its arguments decide layers, first weights and what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_recipes import CONF

from cnn_tuning.config import compose
from cnn_tuning.errors import UserError
from cnn_tuning.models.network import Network, build_network

SHAPE = (1, 8, 8)


def built(*overrides: str, shape=SHAPE, seed: int = 0) -> Network:
    model = compose(
        ["model=plain_cnn", *(f"model.arguments.{o}" for o in overrides)], params=None, conf=CONF
    ).model
    torch.manual_seed(seed)
    return build_network(model, shape, 10, [0.5] * shape[0], [0.25] * shape[0])


def kinds(network: Network) -> list[str]:
    return [type(m).__name__ for m in network.modules() if not list(m.children())]


def convolutions(network: Network) -> list[nn.Conv2d]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("depth", [2, 5, 9])
def test_depth_and_width_count_the_convolutions_and_their_channels(depth):
    network = built(f"depth={depth}", "width=12")
    assert [c.out_channels for c in convolutions(network)] == [12] * depth
    assert network(torch.zeros(3, *SHAPE)).shape == (3, 10)


@pytest.mark.parametrize(
    ("name", "kind"), [("relu", "ReLU"), ("leaky_relu", "LeakyReLU"), ("tanh", "Tanh"), ("sigmoid", "Sigmoid")]
)
def test_each_block_ends_with_the_activation(name, kind):
    assert kinds(built(f"activation={name}", "depth=3")).count(kind) == 3


def test_normalisation_follows_each_convolution():
    assert kinds(built("depth=3")).count("BatchNorm2d") == 0
    found = kinds(built("normalisation=true", "depth=3"))
    assert [found[i + 1] for i, kind in enumerate(found) if kind == "Conv2d"] == ["BatchNorm2d"] * 3


def test_at_scale_one_the_signal_keeps_its_size_and_the_scale_multiplies_it():
    images = torch.rand(200, *SHAPE)
    sizes = {}
    for scale in (1.0, 0.5):
        network = built(f"initial_scale={scale}", "depth=4", "width=64")
        spread = convolutions(network)[1].weight.std().item()
        assert spread == pytest.approx(scale * (2 / (64 * 9)) ** 0.5, rel=0.05)
        sizes[scale] = network(images).std().item()
    assert 0.2 < sizes[1.0] < 5
    assert sizes[0.5] / sizes[1.0] == pytest.approx(0.5**5, rel=1e-3)


def test_scale_zero_is_silence():
    assert built("initial_scale=0.0")(torch.rand(5, *SHAPE)).abs().max() == 0


@pytest.mark.parametrize("normalisation", ["true", "false"])
def test_the_first_bias_shifts_what_the_activation_gets(normalisation):
    images = torch.rand(50, *SHAPE)
    options = (f"normalisation={normalisation}", "depth=2", "activation=relu")
    network = built(*options, "initial_bias=-50.0")
    assert network.body[:2](images).abs().max() == 0
    assert built(*options)(images).std() > 0


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_the_first_blocks_are_frozen(frozen):
    network = built(f"frozen={frozen}", "depth=3", "normalisation=true")
    assert [c.weight.requires_grad for c in convolutions(network)] == [n >= frozen for n in range(3)]
    network(torch.rand(5, *SHAPE)).sum().backward()
    assert [c.weight.grad is not None for c in convolutions(network)] == [n >= frozen for n in range(3)]


@pytest.mark.parametrize("wrong", ["activation=swish", "depth=1", "frozen=9"])
def test_a_wrong_argument_is_one_line(wrong):
    with pytest.raises(UserError, match="plain_cnn"):
        built(wrong)


def test_pictures_of_odd_sides_and_three_channels_fit():
    assert built(shape=(3, 9, 7))(torch.zeros(2, 3, 9, 7)).shape == (2, 10)
