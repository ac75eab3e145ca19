"""The lab recipe in Keras, as a user writes it: an NPZ of images goes in, one JSON line per epoch comes out.

Runs in its own environment (keras-requirements.lock) and imports nothing of cnn_tuning.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers


def build_model(dropout: bool, classes: int = 10) -> keras.Model:
    """Build and compile the lab network for N×28×28×1 images in [0, 1]."""
    rates = (0.25, 0.5) if dropout else (0.0, 0.0)
    model = keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Dropout(rates[0]),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(rates[1]),
            layers.Dense(classes, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def load(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a split as float32 N×28×28×1 in [0, 1] and one-hot labels."""
    with np.load(path) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return images[..., None].astype("float32") / 255, keras.utils.to_categorical(labels, 10)


def main() -> None:
    """Train until the epochs, the seconds or the target accuracy are reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dropout", action="store_true", help="0.25 after the pool, 0.5 after the dense layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, help="stop at this test accuracy")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="of training")
    options = parser.parse_args()

    keras.utils.set_random_seed(options.seed)
    images, labels = load(options.data, "train")
    test_images, test_labels = load(options.data, "test")
    model = build_model(options.dropout)
    seconds = 0.0
    for epoch in range(1, options.epochs + 1):
        start = time.perf_counter()
        model.fit(images, labels, batch_size=32, epochs=epoch, initial_epoch=epoch - 1, verbose=0)
        seconds += time.perf_counter() - start
        accuracy = float(model.evaluate(test_images, test_labels, batch_size=1000, verbose=0)[1])
        line = {
            "epoch": epoch,
            "train_seconds": round(seconds, 3),
            "samples_per_second": round(epoch * len(images) / seconds, 1),
            "test_accuracy": round(accuracy, 6),
        }
        print(json.dumps(line), flush=True)
        if seconds >= options.max_seconds or (options.target is not None and accuracy >= options.target):
            break


if __name__ == "__main__":
    main()
