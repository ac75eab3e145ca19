"""ResNet-9, the nine-layer residual network of the fast CIFAR-10 recipes (David Page, DAWNBench 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from cnn_tuning.models.network import drop


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_block(width, width), _block(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    conv_dropout: float,
    dense_dropout: float,
    width: int = 64,
    logit_scale: float = 0.125,
) -> nn.Module:
    """Return the network for pictures of at least 16×16 pixels; `width` is the first layer's channels."""
    if min(shape[1:]) < 16:
        raise ValueError("at least 16×16 pixels are needed")
    return nn.Sequential(
        _block(shape[0], width),
        _block(width, 2 * width, pool=True),
        _Residual(2 * width),
        _block(2 * width, 4 * width, pool=True),
        _block(4 * width, 8 * width, pool=True),
        _Residual(8 * width),
        drop(conv_dropout),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        drop(dense_dropout),
        nn.Linear(8 * width, classes, bias=False),
        _Scale(logit_scale),
    )


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


def _block(inputs: int, outputs: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
