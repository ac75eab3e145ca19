"""Evidence: equal images are found in and across splits, inputs and answers measured, the test split closed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.repeats import image_digests, repetitions, shared_images
from cnn_tuning.diagnosis.evidence import gather
from cnn_tuning.models.bundle import Specification

PICTURES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=30)


def network_for(data, recipe, mean=None):
    meta = data.meta
    torch.manual_seed(0)
    return Specification(
        meta.name, recipe.model, meta.classes, meta.image, mean or meta.mean, meta.std
    ).build()  # fmt: skip


@pytest.fixture
def altered(digits_data, tmp_path):
    """Prepared digits without a test split, in which some images are planted again."""
    shutil.copytree(digits_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test")
    arrays = {
        split: [np.load(tmp_path / f"data/{split}/{name}.npy") for name in ("images", "labels")]
        for split in ("train", "val")
    }
    (images, labels), (val_images, _) = arrays["train"], arrays["val"]
    val_images[[3, 8]] = images[[5, 700]]
    images[100] = images[5]  # and so the third of that picture
    labels[100] = labels[5]
    images[200] = images[700]
    labels[200] = (labels[700] + 1) % 10
    for split, (pixels, answers) in arrays.items():
        np.save(tmp_path / f"data/{split}/images.npy", pixels)
        np.save(tmp_path / f"data/{split}/labels.npy", answers)
    return PackedData.open(tmp_path / "data")


def test_what_is_planted_is_found_and_the_rest_measured(altered, packed, recipe):
    network = network_for(altered, recipe)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before_planting = gather(network, packed, recipe, torch.device("cpu"))
    data = gather(network, altered, recipe, torch.device("cpu"))
    assert [pair for pair in data.shared.tolist() if pair not in before_planting.shared.tolist()] == [
        [5, 3],
        [200, 8],
    ]
    assert data.repeated == before_planting.repeated + 2
    assert data.conflicting == before_planting.conflicting + 2

    assert data.compared == len(altered.split("train"))
    val = altered.split("val")
    assert data.labels.tolist() == val.labels.tolist()
    assert data.counts.tolist() == np.bincount(altered.split("train").labels).tolist()
    assert data.classes == tuple(altered.meta.classes)
    with torch.no_grad():
        expected = network.eval()(torch.tensor(val.images)).softmax(1).numpy()
    np.testing.assert_allclose(data.probabilities, expected, atol=1e-5)
    assert abs(float(data.input_mean[0])) < 0.02
    assert float(data.input_std[0]) == pytest.approx(1, abs=0.02)
    # As it was, in training mode too.
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_inputs_are_measured_behind_the_normalisation(packed, recipe):
    wrong = network_for(packed, recipe, mean=(packed.meta.mean[0] + packed.meta.std[0],))
    data = gather(wrong, packed, recipe, torch.device("cpu"))
    assert float(data.input_mean[0]) == pytest.approx(-1, abs=0.02)


@given(PICTURES, PICTURES)
def test_equal_images_are_counted_as_by_comparing_all_pairs(train, val):
    def images(entries):
        return np.array([[[[kind, 7 - kind]]] for kind, _ in entries], np.uint8)

    labels = np.array([label for _, label in train])
    digests = image_digests(images(train))
    seen = [kind for kind, _ in train]
    repeated = sum(kind in seen[:at] for at, kind in enumerate(seen))
    conflicting = sum(any(k == kind and other != label for k, other in train) for kind, label in train)
    assert repetitions(digests, labels) == (repeated, conflicting)
    shared = [[seen.index(kind), at] for at, (kind, _) in enumerate(val) if kind in seen]
    assert shared_images(digests, image_digests(images(val))).tolist() == shared
