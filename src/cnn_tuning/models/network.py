"""From a configuration to a network: pictures in (uint8 or [0, 1], N×C×H×W), logits out (N×classes)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnn_tuning.config import ModelConfig, architectures
from cnn_tuning.errors import UserError


class Network(nn.Module):
    """A body with its normalisation inside, so that training, checkpoint and serving see the same pixels."""

    body: Any
    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for uint8 images or for floats in [0, 1].

        In training, a body with auxiliary branches gives a tuple: logits, auxiliary logits.
        """
        return self.body(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """Return what the body takes."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return (pixels - self.mean) / self.std


def build_network(
    config: ModelConfig,
    shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Network:
    """Return an untrained network for pictures of `shape` (C, H, W); its weights follow torch's seed.

    Raises:
        UserError: the architecture or one of its arguments does not exist, or the pictures are too small.
    """
    if config.architecture not in architectures():
        close = difflib.get_close_matches(config.architecture, architectures(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(architectures())}"
        raise UserError(f"model.architecture: no network {config.architecture!r}; {hint}")
    module = importlib.import_module(f"cnn_tuning.models.{config.architecture}")
    conv = config.conv_dropout if config.dropout in ("conv", "both") else 0.0
    dense = config.dense_dropout if config.dropout in ("dense", "both") else 0.0
    try:
        body = module.build(shape, classes, conv_dropout=conv, dense_dropout=dense, **config.arguments)
        with torch.no_grad():
            body.eval()(torch.zeros(1, *shape))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {config.name!r} does not fit pictures of {shape}: {reason}") from error
    return Network(body.train(), mean, std)


class Dropout(nn.Dropout):
    """`nn.Dropout`, on a CPU with 16 random bits an activation: a third of torch's time there."""

    def forward(self, activations: Tensor) -> Tensor:
        """Return the activations, in training with a share `p` of them at 0 and the others scaled up."""
        if not self.training or activations.device.type != "cpu":
            return super().forward(activations)
        words = torch.empty(-(-activations.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: activations.numel()]
        keep = bits >= round(self.p * 2**16) - 2**15
        # In the memory order of the activations, so that channels_last costs no copy.
        mask = torch.empty_like(activations)
        flat = mask.as_strided((mask.numel(),), (1,))
        torch.mul(keep, 1 / (1 - self.p), out=flat)
        return activations * mask


def drop(rate: float) -> nn.Module:
    """Return dropout of single activations, or nothing at rate 0."""
    return Dropout(rate) if rate else nn.Identity()
