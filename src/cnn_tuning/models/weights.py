"""Published weights: a file comes in, tensors by the names of a backbone's trunk go out. No pickle is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnn_tuning.errors import UserError
from cnn_tuning.models.backbone import AUXILIARY, AUXILIARY_LOGITS

Tensors = dict[str, Tensor]


def read_tensors(path: Path) -> Tensors:
    """Return the named tensors of a safetensors file, or of one that `torch.save` wrote, in their order.

    Raises:
        UserError: it is neither, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path.name} holds no safetensors ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path.name} is not read: it holds no tensors or more than tensors ({reason[:120]}); "
            "convert it to safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path.name} holds no named tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def by_order(tensors: Tensors, reference: nn.Module) -> Tensors:
    """Return the tensors under the names of `reference`, which has as many of the same shapes in this order.

    Those of its last layer may be of another shape: of another number of classes.
    """
    own = reference.state_dict()
    counters = sum(name.endswith("num_batches_tracked") for name in own)
    names = list(own)
    if len(tensors) == len(own) - counters:  # written by an old torch
        names = [name for name in names if not name.endswith("num_batches_tracked")]
    if len(tensors) != len(names):
        raise UserError(f"the weights are {len(tensors)} tensors, the network has {len(own)}: map them by_name")
    pairs = list(zip(names, tensors.items(), strict=True))
    for name, (theirs, tensor) in pairs[:-2]:
        if tensor.shape != own[name].shape:
            raise UserError(
                f"the weights do not fit in this order: {theirs} {_shape(tensor)} is no {name} {_shape(own[name])}"
            )
    return {name: tensor for name, (_, tensor) in pairs}


def of_trunk(tensors: Tensors, trunk: nn.Module) -> Tensors:
    """Return those of the tensors that a trunk has.

    The last layers of auxiliary branches answer for other classes and are left out.

    Raises:
        UserError: one is missing or of another shape.
    """
    chosen: Tensors = {}
    for name, own in trunk.state_dict().items():
        if name.startswith(AUXILIARY_LOGITS):
            continue
        tensor = tensors.get(name)
        new = name.startswith(AUXILIARY)
        if tensor is not None and tensor.shape == own.shape:
            chosen[name] = tensor.to(own.dtype).contiguous()
        elif tensor is None and not new and not name.endswith("num_batches_tracked"):
            raise UserError(f"the weights lack {name} ({len(tensors)} tensors, such as {next(iter(tensors))})")
        elif tensor is not None:
            raise UserError(f"the weights' {name} is {_shape(tensor)}, the network's {_shape(own)}")
    return chosen


def put_into(trunk: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Give a trunk its pretrained weights; new parts of auxiliary branches keep theirs."""
    try:
        left = trunk.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the pretrained weights do not fit pictures of this size or kind ({reason})") from None
    missing = [name for name in left.missing_keys if not name.startswith(AUXILIARY)]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or left.unexpected_keys:
        raise UserError(f"the pretrained weights are of another network ({(missing or left.unexpected_keys)[0]})")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "1"
