"""Small pictures, tiny backbones with saved weights, and the stage that fetches them, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from training_recipes import CONF

from cnn_tuning.config import ModelConfig, Recipe, compose, patch, select
from cnn_tuning.data.digests import sha256_of
from cnn_tuning.data.packed import Meta, PackedData, class_counts, digest_of
from cnn_tuning.stages.command import Place
from cnn_tuning.stages.fetch_weights import FetchWeightsConfig, run

CLASSES = ("red", "green", "blue")


def pictures(folder: Path, side: int = 32, **counts: int) -> PackedData:
    """Write prepared data: noisy pictures, each class brighter in one channel."""
    counts = {"train": 96, "val": 48, "test": 24} | counts
    rng = np.random.default_rng(0)
    digests, by_split = {}, {}
    for split, count in counts.items():
        labels = np.arange(count, dtype=np.int64) % len(CLASSES)
        images = rng.integers(0, 100, (count, 3, side, side), dtype=np.uint8)
        images[np.arange(count), labels] += 150
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "images.npy", images)
        np.save(folder / split / "labels.npy", labels)
        digests[split], by_split[split] = digest_of(images, labels), class_counts(labels, len(CLASSES))
    image = {"size": [side, side], "channels": 3, "resize": "crop", "interpolation": "bilinear", "background": 0}
    meta = {"name": "colours", "classes": CLASSES, "image": image, "counts": by_split, "mean": [0.4] * 3}
    meta |= {"std": [0.23] * 3, "bytes": sum(counts.values()) * 3 * side**2, "seed": 0, "sources": {}}
    text = Meta.from_json(json.dumps(meta | {"digests": digests})).to_json()
    (folder / "meta.json").write_text(text)
    return PackedData.open(folder)


def recipe_of(*overrides: str, **changes: object) -> Recipe:
    """Return a recipe for a tiny residual network of timm, of three epochs."""
    short = ["experiment=digits", "model=resnet50", "model.arguments.name=test_resnet", "augment=none"]
    short += ["trainer.max_epochs=3", "trainer.batch_size=16", "schedule=constant", "optimizer=adamw"]
    short += ["optimizer.learning_rate=0.01", "trainer.threads=1", *overrides]
    recipe = select(Recipe, compose(short, params=None, conf=CONF))
    return patch(recipe, {name.replace("__", "."): value for name, value in changes.items()})


def save_weights(path: Path, name: str = "test_resnet", seed: int = 7) -> dict[str, torch.Tensor]:
    """Write a network's random weights, as a publisher would, and return them."""
    from cnn_tuning.models.backbone import original

    torch.manual_seed(seed)
    network = original("timm", name)
    with torch.no_grad():  # so that normalisation knows what it normalises, as after a training
        for _ in range(15):
            network(torch.randn(8, 3, 32, 32) + torch.randn(8, 3, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return network.state_dict()


def pretrained_recipe(folder: Path, *overrides: str, **changes: object) -> Recipe:
    """Save weights, fetch them into `models/pretrained` here, and return a recipe that begins with them."""
    path = folder / "published" / "tiny.pth"
    save_weights(path)
    weights = {
        "file": path.name,
        "sha256": sha256_of(path),
        "sources": [{"uri": f"file:{path.parent}/"}],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
    }
    recipe = recipe_of(*overrides, model__pretrained=True, model__weights=weights, **changes)
    fetch(recipe.model)
    return recipe


def fetch(model: ModelConfig) -> Path:
    """Run the stage `fetch_weights` here."""
    run(FetchWeightsConfig(model), Place(Path(), Path()))
    return Path("models/pretrained")
