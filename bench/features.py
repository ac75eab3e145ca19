"""A search of heads on a frozen backbone, its features computed once and computed anew: one run, the ratio.

    python bench/features.py [--heads 6] [--epochs 5] [--size 96]

EfficientNet-Lite0 with its ImageNet weights; crops of four halves of two photographs that scikit-learn
carries. Each head is fitted and looked at as a trial of a search is. Goes out: seconds of both, their ratio
(goal: 10), and the largest difference of probabilities.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from workplace import ROOT, machine

from cnn_tuning.config import Recipe, compose, patch, select
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.stages.command import Place
from cnn_tuning.stages.fetch_weights import FetchWeightsConfig
from cnn_tuning.stages.fetch_weights import run as fetch_weights
from cnn_tuning.training.fit import fit

UNITS = (None, 64, 128, 256, 512, 1024)
TRAIN, VAL = 400, 100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=96)
    asked = parser.parse_args()
    described = machine()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        (Path(scratch) / "conf").symlink_to(ROOT / "conf")
        data = crops(asked.size)
        chosen = ["experiment=digits", "data=image_folder", "model=efficientnet_lite0", "augment=none"]
        chosen += ["optimizer=adamw", "optimizer.learning_rate=0.003", "trainer.finetune.trainable=head"]
        chosen += ["trainer.batch_size=50", f"trainer.max_epochs={asked.epochs}"]
        config = compose(chosen, params=None)
        fetch_weights(FetchWeightsConfig(config.model), Place(Path(), Path()))
        recipe = select(Recipe, config)
        fit(patch(recipe, {"trainer.max_epochs": 1}), data, state_folder=Path("warm-up"), brief=True)
        for kept in Path(".state/features").iterdir():
            kept.rename(Path(scratch) / f"forgotten-{kept.name}")
        cached, with_cache = search(recipe, data, asked.heads, config.diagnosis)
        anew = patch(recipe, {"trainer.finetune.cache_features": "no"})
        plain, without = search(anew, data, asked.heads, config.diagnosis)
    counts = " + ".join(str(sum(data.meta.counts[split])) for split in ("train", "val"))
    apart = max(float(np.abs(a - b).max()) for a, b in zip(with_cache, without, strict=True))
    print(f"\n{described}\n{asked.heads} heads, {asked.epochs} epochs each, {counts} crops of {asked.size} px")
    print(f"computed anew: {plain:.1f} s; computed once: {cached:.1f} s, the features among them")
    print(f"ratio: {plain / cached:.1f} (goal 10); probabilities apart by at most {apart:.1e}")


def search(recipe: Recipe, data: PackedData, heads: int, diagnosis: object) -> tuple[float, list[np.ndarray]]:
    """Fit the heads one after the other; return seconds and each one's validation probabilities."""
    began, probabilities = time.monotonic(), []
    for number in range(heads):
        trial = patch(recipe, {"model.arguments.units": UNITS[number % len(UNITS)], "seed": number})
        watch = Watch(trial, diagnosis, f"head {number}", stops=False)
        fitted = fit(trial, data, state_folder=Path("state"), callbacks=watch.callbacks, brief=True)
        probabilities.append(watch.conclude(fitted, data).data.probabilities)
        fitted.state.remove()
        print(f"  head of {trial.model.arguments['units']}: val/accuracy {fitted.best['val/accuracy']:.2%}",
              file=sys.stderr)  # fmt: skip
    return time.monotonic() - began, probabilities


def crops(size: int) -> PackedData:
    """Prepare crops of photographs: which half of which picture are they of?"""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for picture, name in zip(load_sample_images().images, ("china", "flower"), strict=True):
        height, width = picture.shape[:2]
        for half, left in enumerate((0, width // 2)):
            for number in range((TRAIN + VAL) // 4):
                split = "train" if number < TRAIN // 4 else "valid"
                top = rng.integers(0, height - size)
                begin = left + rng.integers(0, width // 2 - size)
                folder = Path("raw", split, f"{name}-{half}")
                folder.mkdir(parents=True, exist_ok=True)
                crop = picture[top : top + size, begin : begin + size]
                Image.fromarray(crop).save(folder / f"{number}.png")
    config = compose(
        ["data=image_folder", f"data.image.size=[{size},{size}]", "experiment=digits"], params=None
    ).data
    prepare(config, Path("raw"), Path("prepared"), seed=0)
    return PackedData.open(Path("prepared"))


if __name__ == "__main__":
    main()
