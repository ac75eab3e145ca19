"""What was first not finite in a training whose loss broke: network and batch in, a layer and a step out."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cnn_tuning.data.batches import Purpose, seed_of
from cnn_tuning.diagnosis.probe import layer_name
from cnn_tuning.training.classifier import Classifier

UNKNOWN = "the loss"


def first_not_finite(trainer: pl.Trainer, module: Classifier, batch: Any, first_loss: int) -> tuple[str, int]:
    """Return what was first not finite, such as "output of 3 (Conv2d)", and its step (1 is the first).

    `batch`: of the last step; `first_loss`: the first step whose loss is not finite, 0 where all are and measuring
    after a step found it. Where an update broke the weights, its gradients are still there. When a GPU tells of
    a loss some steps late, nothing finite is left: then only the step is known.
    """
    done = trainer.global_step
    if 0 < first_loss <= done:
        return UNKNOWN, first_loss
    weights = _broken_weights(module.network)
    if weights:
        return weights, done
    network = module.network if first_loss else module.measured_network
    return _broken_output(trainer, module, network, batch) or UNKNOWN, first_loss or done


def _broken_weights(network: nn.Module) -> str:
    """Return the gradient that was first not finite, from the output back, or else the first such weights."""
    if all(_finite(parameter) for parameter in network.parameters()):
        return ""
    modules = [(module, _shown(name, module)) for name, module in network.named_modules()]
    for module, shown in reversed(modules):
        if not all(p.grad is None or _finite(p.grad) for p in module.parameters(recurse=False)):
            return f"gradient of {shown}"
    for module, shown in modules:
        if not all(_finite(parameter) for parameter in module.parameters(recurse=False)):
            return f"weights of {shown}"
    return ""


def _broken_output(trainer: pl.Trainer, module: Classifier, network: nn.Module, batch: Any) -> str:
    """Return the first module whose output for the batch is not finite, with the dropout of that step."""
    found: list[str] = []
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in network.modules()):
        return ""  # it would ask other processes, which do not look
    again = copy.deepcopy(network)  # normalisation counts what passes through it
    again.train(network.training)

    def look(name: str, layer: nn.Module, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not _finite(output):
            found.append(f"output of {_shown(name, layer)}")

    for name, layer in again.named_modules():
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), trainer.precision_plugin.forward_context():
        torch.manual_seed(seed_of(Purpose.DROPOUT, module.recipe.seed, trainer.global_step))
        again(batch[0])
    return found[0] if found else ""


def _shown(name: str, module: nn.Module) -> str:
    if name in ("", "body"):
        return "the network"
    return f"{layer_name(name)} ({type(module).__name__})"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
