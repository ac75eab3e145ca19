"""A plain stack of convolutions that forgives no bad start: for studying what makes a training sick."""

from __future__ import annotations

from torch import nn

from cnn_tuning.models.network import drop

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    conv_dropout: float,
    dense_dropout: float,
    width: int = 16,
    depth: int = 4,
    activation: str = "relu",
    normalisation: bool = False,
    initial_scale: float = 1.0,
    initial_bias: float = 0.0,
    frozen: int = 0,
) -> nn.Module:
    """Return `depth` blocks, max-pool 2 after the first half of them → flatten → logits.

    A block is a padded 3×3 convolution, batch normalisation if asked for, and the activation; [conv dropout]
    stands before the pool, [dense dropout] before the logits. Weights start as He et al. (2015) draw them, times
    `initial_scale`; `initial_bias` is what each block adds before its activation at the start. The first
    `frozen` blocks are not trained.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    if depth < 2 or min(shape[1:]) < 2 or not 0 <= frozen <= depth:
        raise ValueError("depth and the pictures' sides must be at least 2, frozen from 0 to depth")
    channels, rows, columns = shape
    blocks = [
        _block(channels if number == 0 else width, width, _ACTIVATIONS[activation](), normalisation)
        for number in range(depth)
    ]
    flat = width * (rows // 2) * (columns // 2)
    half = depth // 2
    network = nn.Sequential(
        *blocks[:half],
        drop(conv_dropout),
        nn.MaxPool2d(2),
        *blocks[half:],
        nn.Flatten(),
        drop(dense_dropout),
        nn.Linear(flat, classes),
    )
    _start(network, initial_scale, initial_bias)
    for block in blocks[:frozen]:
        block.requires_grad_(False)
    return network


def _block(inputs: int, outputs: int, activation: nn.Module, normalisation: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not normalisation)]
    if normalisation:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, activation)


def _start(network: nn.Sequential, scale: float, bias: float) -> None:
    """Draw the first weights; the output layer's bias starts at 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):  # no ReLU follows the logits
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= scale
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.bias is not None:
            nn.init.constant_(module.bias, bias)
