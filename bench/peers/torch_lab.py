"""The lab recipe as a plain PyTorch loop: an NPZ of images goes in, one JSON line per epoch comes out.

Written as most people write it (DataLoader over a TensorDataset, fp32); imports nothing of cnn_tuning.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_model(dropout: bool, classes: int = 10) -> nn.Module:
    """Build the lab network for N×1×28×28 images in [0, 1]; it returns logits."""
    rates = (0.25, 0.5) if dropout else (0.0, 0.0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(rates[0]),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Dropout(rates[1]),
        nn.Linear(128, classes),
    )


def load(path: Path, split: str) -> TensorDataset:
    """Read a split as float32 N×1×28×28 in [0, 1] and label indices."""
    with np.load(path) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return TensorDataset(
        torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels.astype("int64"))
    )


def train_epoch(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> None:
    """Take one step per batch of the loader."""
    loss_function = nn.CrossEntropyLoss()
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss_function(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy_on(model: nn.Module, loader: DataLoader) -> float:
    """Return the share of images that the model classifies correctly."""
    model.eval()
    hits = seen = 0
    for images, labels in loader:
        hits += int((model(images).argmax(1) == labels).sum())
        seen += len(labels)
    return hits / seen


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

    torch.manual_seed(options.seed)
    train = load(options.data, "train")
    train_loader = DataLoader(train, batch_size=32, shuffle=True)
    test_loader = DataLoader(load(options.data, "test"), batch_size=1000)
    model = build_model(options.dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = 0.0
    for epoch in range(1, options.epochs + 1):
        start = time.perf_counter()
        train_epoch(model, train_loader, optimizer)
        seconds += time.perf_counter() - start
        accuracy = accuracy_on(model, test_loader)
        line = {
            "epoch": epoch,
            "train_seconds": round(seconds, 3),
            "samples_per_second": round(epoch * len(train) / seconds, 1),
            "test_accuracy": round(accuracy, 6),
        }
        print(json.dumps(line), flush=True)
        if seconds >= options.max_seconds or (options.target is not None and accuracy >= options.target):
            break


if __name__ == "__main__":
    main()
