"""The network of the lab: two convolutions, max-pooling and one hidden layer."""

from __future__ import annotations

from torch import nn

from cnn_tuning.models.network import drop


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    conv_dropout: float,
    dense_dropout: float,
    filters: tuple[int, int] = (32, 64),
    units: int = 128,
) -> nn.Module:
    """Return Conv 3×3 → Conv 3×3 → max-pool 2 → [dropout] → dense → [dropout] → logits, with ReLUs.

    `shape` is (C, H, W), at least 6×6 pixels.
    """
    channels, height, width = shape
    first, second = filters
    # Unpadded 3×3 twice, halved; ReLU after the pool equals ReLU before it and costs a quarter.
    flat = second * ((height - 4) // 2) * ((width - 4) // 2)
    if flat <= 0:
        raise ValueError("at least 6×6 pixels are needed")
    return nn.Sequential(
        nn.Conv2d(channels, first, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, 3),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        drop(conv_dropout),
        nn.Flatten(),
        nn.Linear(flat, units),
        nn.ReLU(inplace=True),
        drop(dense_dropout),
        nn.Linear(units, classes),
    )
