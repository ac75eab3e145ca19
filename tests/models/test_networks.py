"""Networks: what they accept and give, where dropout sits, normalisation inside, bundles on disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_recipes import CONF

from cnn_tuning.config import ImageConfig, architectures, compose, patch
from cnn_tuning.errors import UserError
from cnn_tuning.models import bundle
from cnn_tuning.models.network import Dropout, build_network
from cnn_tuning.training.fit import layer_table

SHAPES = {"lab_cnn": (1, 28, 28), "compact_cnn": (1, 28, 28), "compact_cnn_fast": (1, 28, 28),
          "compact_cnn_small": (1, 8, 8), "resnet9": (3, 32, 32), "plain_cnn": (1, 8, 8)}  # fmt: skip


def built(name: str, *overrides: str):
    model = compose([f"model={name}", *overrides], params=None, conf=CONF).model
    channels = SHAPES[name][0]
    return build_network(model, SHAPES[name], 10, [0.5] * channels, [0.25] * channels)


def test_every_model_of_conf_is_tested_here():
    backbones = {"resnet50", "inception_v3", "efficientnet_lite0", "convnext_tiny"}  # in test_backbone.py
    assert set(SHAPES) | backbones == {p.stem for p in (CONF / "model").glob("*.yaml")}
    assert set(architectures()) == {"backbone", "lab_cnn", "compact_cnn", "plain_cnn", "resnet9"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_network_gives_logits_and_learns_one_batch(name):
    torch.manual_seed(0)
    network = built(name, *(["model.arguments.width=8"] if name == "resnet9" else []))
    images = torch.randint(0, 256, (20, *SHAPES[name]), dtype=torch.uint8)
    labels = torch.arange(20) % 10
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(60):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert network(images).shape == (20, 10)
    assert loss.item() < 0.5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("sites", "count"), [("none", 0), ("conv", 1), ("dense", 1), ("both", 2)])
def test_dropout_sits_where_it_is_asked_for(name, sites, count):
    network = built(name, f"model.dropout={sites}", "model.conv_dropout=0.2", "model.dense_dropout=0.4")
    rates = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(rates) == count
    expected = {"none": [], "conv": [0.2], "dense": [0.4], "both": [0.2, 0.4]}[sites]
    assert rates == expected


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_rate_alone_and_scales_the_rest(order, rate):
    torch.manual_seed(0)
    ones = torch.ones(64, 32, 16, 16).to(memory_format=order).requires_grad_()
    dropped = Dropout(rate).train()(ones)
    assert dropped.is_contiguous(memory_format=order)
    gone = dropped == 0
    count = gone.numel()
    spread = (rate * (1 - rate) / count) ** 0.5
    assert abs(gone.float().mean().item() - rate) < 5 * spread
    assert torch.allclose(dropped[~gone], torch.tensor(1 / (1 - rate)))
    flat = gone.permute(0, 2, 3, 1).reshape(-1).float() - rate
    for lag in range(1, 9):  # neighbours in memory share a random word: they must not share a fate
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 5 * rate * (1 - rate) / count**0.5
    dropped.sum().backward()
    assert torch.equal(ones.grad == 0, gone)
    assert torch.equal(Dropout(rate).eval()(ones), ones)


def test_bytes_and_shares_of_one_are_the_same_pixels():
    network = built("lab_cnn").eval()
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    assert torch.allclose(network(images), network(images.float() / 255))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_labels_and_indices_give_the_same_loss(smoothing):
    logits = torch.randn(30, 10, dtype=torch.float64)
    labels = torch.arange(30) % 10
    hot = F.one_hot(labels, 10).double()
    by_index = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.allclose(by_index, F.cross_entropy(logits, hot, label_smoothing=smoothing))


def test_the_lab_network_has_the_labs_layers_and_parameters():
    kinds = [type(m).__name__ for m in built("lab_cnn").body if not isinstance(m, torch.nn.Identity)]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "MaxPool2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]
    # 320 + 18,496 + 1,179,776 + 1,290, as the lab's table says.
    assert sum(p.numel() for p in built("lab_cnn").parameters()) == 1_199_882


def test_the_table_of_the_lab_network_has_shapes_parameters_and_operations():
    table = layer_table(built("lab_cnn"), SHAPES["lab_cnn"])
    head, _, *lines = table.splitlines()
    assert [cell.strip() for cell in head.split("|")][1:] == [
        "Name", "Type", "Params", "Mode", "FLOPs", "In sizes", "Out sizes",
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line.split("|")][1:] for line in lines if "|" in line]
    shown = [(kind, parameters, outputs) for _, kind, parameters, _, _, _, outputs in cells]
    assert [line for line in shown if line[0] in ("Conv2d", "Linear")] == [
        ("Conv2d", "320", "[1, 32, 26, 26]"),
        ("Conv2d", "18.5 K", "[1, 64, 24, 24]"),
        ("Linear", "1.2 M", "[1, 128]"),
        ("Linear", "1.3 K", "[1, 10]"),
    ]
    # Two operations a multiplication with its addition: 2 × 26 × 26 × 32 × 9 of the first convolution.
    (flops,) = {line[4] for line in cells if line[2] == "320"}
    assert flops == "389 K"
    assert "1.2 M     Total params" in table


def specification(name="lab_cnn"):
    model = compose([f"model={name}"], params=None, conf=CONF).model
    image = ImageConfig(size=SHAPES[name][1:], channels=SHAPES[name][0])
    return bundle.Specification("digits", model, tuple("0123456789"), image, (0.1,), (0.3,))


def test_a_bundle_gives_back_the_same_network_from_the_same_bytes(tmp_path):
    spec = specification()
    network = spec.build().eval()
    for name in "ab":
        bundle.save(tmp_path / name, network, spec)
    for file in (bundle.WEIGHTS, bundle.MODEL):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded, again = bundle.load(tmp_path / "a")
    assert again == spec
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(loaded(images), network(images))


def test_a_bundle_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    spec = specification()
    bundle.save(tmp_path, spec.build(), spec)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write = Path.write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", lambda path, text: full(path, text.encode()))
    with pytest.raises(OSError, match="No space left"):
        bundle.save(tmp_path, spec.build(), spec)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.endswith(".partial")}
    assert after == before
    bundle.load(tmp_path)


def test_a_bundle_that_was_altered_or_does_not_fit_is_refused_in_a_line(tmp_path):
    bundle.save(tmp_path, specification().build(), specification())
    whole = (tmp_path / bundle.WEIGHTS).read_bytes()
    (tmp_path / bundle.WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(UserError, match="SHA-256 differs"):
        bundle.load(tmp_path)
    (tmp_path / bundle.WEIGHTS).write_bytes(whole)
    content = json.loads((tmp_path / bundle.MODEL).read_text())
    content["model"]["arguments"]["units"] = 64
    (tmp_path / bundle.MODEL).write_text(json.dumps(content))
    with pytest.raises(UserError, match="made by other code"):
        bundle.load(tmp_path)
    (tmp_path / bundle.MODEL).unlink()
    with pytest.raises(UserError, match="is missing"):
        bundle.load(tmp_path)


def test_patching_an_argument_changes_the_network():
    model = compose(["model=lab_cnn"], params=None, conf=CONF).model
    wide = patch(model, {"arguments.units": 256})
    network = build_network(wide, (1, 28, 28), 10, [0.0], [1.0])
    assert network.body[-1].in_features == 256
