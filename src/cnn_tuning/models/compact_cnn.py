"""A small network for small pictures, made for the CPU: a strided stem, then little work a pixel."""

from __future__ import annotations

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
) -> nn.Module:
    """Return strided stem → 3×3 blocks → max-pool 2 → 3×3 blocks → flatten → [dropout] → logits.

    Every convolution is followed by batch normalisation and ReLU; [conv dropout] stands before the pool.
    Those before the pool are `padded` or shrink the picture, which is cheaper. Positions are kept to the
    end: an average over them would need several more epochs.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    blocks = [(stem, stem_kernel, stem_stride), *((w, 3, 1) for w in widths)]
    for outputs, kernel, stride in blocks:
        padding = kernel // 2 if padded else 0
        layers += _block(channels, outputs, kernel, stride, padding)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        channels = outputs
    if min(height, width) < 2:
        raise ValueError("the pictures are too small: set model.arguments.padded=true or stem_stride=1")
    layers += [drop(conv_dropout), nn.MaxPool2d(2)]
    for outputs in deep_widths:
        layers += _block(channels, outputs, 3, 1, 1)
        channels = outputs
    flat = channels * (height // 2) * (width // 2)
    return nn.Sequential(*layers, nn.Flatten(), drop(dense_dropout), nn.Linear(flat, classes))


def _block(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
