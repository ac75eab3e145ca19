"""Heat maps of networks whose attention is known, for pictures of one and of three channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cnn_tuning.config import ModelConfig
from cnn_tuning.evaluation.explanation import heat_maps, last_convolution
from cnn_tuning.models.network import build_network
from cnn_tuning.reports.plots import as_colours, overlay

SIDE = 16
SMALL = {
    "compact_cnn": {"stem": 8, "widths": [16], "deep_widths": [16], "padded": True},
    "lab_cnn": {"filters": [8, 16], "units": 32},
    "resnet9": {"width": 8},
}
QUADRANTS = [(slice(0, 8), slice(0, 8)), (slice(0, 8), slice(8, 16)), (slice(8, 16), slice(0, 8)),
             (slice(8, 16), slice(8, 16))]  # fmt: skip


class Quadrants(nn.Module):
    """Answers with the quadrant whose mean brightness is the greatest: class q reads quadrant q alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(2)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[0, :, 1, 1] = 1.0  # a copy of the picture, and a map of nothing

    def forward(self, pixels):
        return self.pool(torch.relu_(self.conv(pixels)))[:, 0].flatten(1)


def share_inside(heat: np.ndarray, quadrant: int) -> float:
    return float(heat[QUADRANTS[quadrant]].sum() / heat.sum())


@pytest.mark.parametrize("channels", [1, 3])
def test_heat_is_where_the_class_that_was_asked_for_is_read(channels):
    # All four quadrants are bright: only the class tells them apart.
    images = np.full((4, channels, SIDE, SIDE), 200, np.uint8)
    maps = heat_maps(Quadrants(channels).eval(), images, np.arange(4))
    assert maps.shape == (4, SIDE, SIDE)
    assert maps.dtype == np.float32
    for quadrant in range(4):
        assert share_inside(maps[quadrant], quadrant) > 0.999
        assert maps[quadrant].max() == 1


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(1, 3))
@settings(max_examples=20)
def test_heat_is_a_share_of_its_own_maximum(seed, channels, count):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, channels, SIDE, SIDE), dtype=np.uint8)
    classes = rng.integers(0, 4, count)
    maps = heat_maps(Quadrants(channels).eval(), images, classes)
    assert maps.shape == (count, SIDE, SIDE)
    assert maps.min() >= 0
    for heat, image in zip(maps, images, strict=True):
        assert heat.max() in (0, 1)
        shown = overlay(image, heat)
        assert (shown.shape, shown.dtype) == ((SIDE, SIDE, 3), np.uint8)
        np.testing.assert_array_equal(shown[heat == 0], as_colours(image)[heat == 0])
    # More pictures in a call change none of them.
    np.testing.assert_allclose(heat_maps(Quadrants(channels).eval(), images[:1], classes[:1]), maps[:1], atol=1e-6)


def test_nothing_that_speaks_for_a_class_is_no_heat():
    black = np.zeros((1, 1, SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(heat_maps(Quadrants(1).eval(), black, np.zeros(1, int)), 0)
    assert heat_maps(Quadrants(1).eval(), black[:0], np.zeros(0, int)).shape == (0, SIDE, SIDE)


def test_a_network_without_a_convolution_that_keeps_places_has_no_heat():
    images = np.zeros((1, 1, SIDE, SIDE), np.uint8)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 4))
    assert heat_maps(dense, images, np.zeros(1, int)) is None
    whole = nn.Sequential(nn.Conv2d(1, 4, SIDE), nn.Flatten())
    assert heat_maps(whole, images, np.zeros(1, int)) is None


def test_the_last_convolution_is_the_last_that_runs_with_places_enough():
    class Order(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse = nn.Conv2d(4, 4, 3, stride=4)
            self.late, self.early = nn.Conv2d(4, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, pixels):
            return self.coarse(self.late(self.early(pixels))).mean((2, 3))

    network = Order()
    assert last_convolution(network, torch.zeros(1, 1, SIDE, SIDE)) is network.late
    assert last_convolution(network, torch.zeros(1, 1, 8, 8)) is network.early  # 6×6, the others have fewer


@pytest.fixture(scope="module", params=SMALL)
def trained(request):
    """One of the networks, trained to tell which quadrant a bright blob is in; pictures, and where it looks."""
    torch.manual_seed(0)
    arguments = SMALL[request.param]
    model = ModelConfig("test", request.param, "none", 0.0, 0.0, arguments)
    network = build_network(model, (3, SIDE, SIDE), 4, (0.2,) * 3, (0.2,) * 3)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        images, labels = blobs(rng, 64)
        loss = nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def blobs(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    images = rng.integers(0, 80, (count, 3, SIDE, SIDE), dtype=np.uint8)
    labels = rng.integers(0, 4, count)
    for image, label in zip(images, labels, strict=True):
        top, left = (label // 2) * 8 + rng.integers(1, 4), (label % 2) * 8 + rng.integers(1, 4)
        image[:, top : top + 4, left : left + 4] = 255
    return images, labels


def test_a_trained_network_looked_at_the_quadrant_that_its_answer_is_about(trained):
    images, labels = blobs(np.random.default_rng(1), 80)
    with torch.no_grad():
        answers = trained(torch.from_numpy(images)).argmax(1).numpy()
    assert (answers == labels).mean() > 0.9  # it has learnt: else its attention says nothing
    right = answers == labels
    maps = heat_maps(trained, images[right], answers[right])
    inside = [share_inside(heat, label) for heat, label in zip(maps, labels[right], strict=True)]
    assert np.mean(inside) > 0.4  # a quarter by chance
    hottest = [np.unravel_index(heat.argmax(), heat.shape) for heat in maps]
    where = np.array([2 * (row // 8) + column // 8 for row, column in hottest])
    assert (where == labels[right]).mean() > 0.6


def test_looking_leaves_the_network_as_it_was(trained):
    images, labels = blobs(np.random.default_rng(2), 3)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    one = heat_maps(trained, images, labels)
    np.testing.assert_array_equal(one, heat_maps(trained, images, labels))
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    assert not any(module._forward_hooks for module in trained.modules())
    assert not any(
        parameter.grad is not None and parameter.grad.isnan().any() for parameter in trained.parameters()
    )
