"""A small network for small pictures, made for the CPU: a strided stem, then little work a pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from cnn_tuning.models.network import drop


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    conv_dropout: float,
    dense_dropout: float,
    stem: int = 16,
    stem_kernel: int = 5,
    stem_stride: int = 2,
    widths: Sequence[int] = (32, 32),
    deep_widths: Sequence[int] = (64,),
    padded: bool = False,
    deep_padded: bool = True,
) -> nn.Module:
    """Return strided stem → 3×3 blocks → max-pool 2 → 3×3 blocks → flatten → [dropout] → logits.

    Every convolution is followed by batch normalisation and ReLU; [conv dropout] stands before the pool.
    Those before the pool are `padded`, those after it `deep_padded`, or shrink the picture, which is
    cheaper. Positions are kept to the end: an average over them would need several more epochs.
    """
    before = [(stem, stem_kernel, stem_stride), *((width, 3, 1) for width in widths)]
    after = [(width, 3, 1) for width in deep_widths]
    shallow, (channels, height, width) = _blocks(shape, before, padded)
    deep, flat = _blocks((channels, height // 2, width // 2), after, deep_padded)
    if min(flat) < 1:
        raise ValueError("the pictures are too small: set model.arguments.padded=true or stem_stride=1")
    return nn.Sequential(
        *shallow,
        drop(conv_dropout),
        nn.MaxPool2d(2),
        *deep,
        nn.Flatten(),
        drop(dense_dropout),
        nn.Linear(math.prod(flat), classes),
    )


def _blocks(
    shape: tuple[int, int, int], blocks: Sequence[tuple[int, int, int]], padded: bool
) -> tuple[list[nn.Module], tuple[int, int, int]]:
    """Return layers for (channels, kernel, stride) one after the other, and the shape that comes out."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for outputs, kernel, stride in blocks:
        padding = kernel // 2 if padded else 0
        convolution = nn.Conv2d(channels, outputs, kernel, stride=stride, padding=padding, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        channels = outputs
    return layers, (channels, height, width)
