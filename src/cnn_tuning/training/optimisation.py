"""From configuration to torch's optimizers and learning-rate schedules (per step, except plateau)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from cnn_tuning.config import (
    CosineConfig,
    OneCycleConfig,
    OptimizerConfig,
    PlateauConfig,
    ScheduleConfig,
    SgdConfig,
    StepConfig,
)

# Parameters and the share of the learning rate at which they are trained.
Share = tuple[float, list[nn.Parameter]]


def build_optimizer(
    network: nn.Module, config: OptimizerConfig, *, fused: bool, shares: Sequence[Share] | None = None
) -> Optimizer:
    """Return the optimizer; weight decay leaves out biases and normalisation.

    `shares`: what is trained at which share of the learning rate; by default all of the network at all of it.
    """
    groups: list[dict[str, Any]] = []
    for share, parameters in shares or [(1.0, list(network.parameters()))]:
        decayed = [p for p in parameters if p.ndim > 1]
        kept = [p for p in parameters if p.ndim <= 1]
        rate = share * config.learning_rate
        groups += [
            {"params": decayed, "weight_decay": config.weight_decay, "lr": rate, "share": share},
            {"params": kept, "weight_decay": 0.0, "lr": rate, "share": share},
        ]
    if isinstance(config, SgdConfig):
        nesterov = config.nesterov and config.momentum > 0
        return SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=nesterov, fused=fused or None
        )
    kind = Adam if config.name == "adam" else AdamW
    return kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=fused or None)


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int, steps_per_epoch: int) -> LRScheduler:
    """Return the schedule over `steps` updates; plateau is stepped once an epoch with val/loss."""
    if isinstance(config, PlateauConfig):
        return ReduceLROnPlateau(optimizer, factor=config.factor, patience=config.patience)
    if isinstance(config, OneCycleConfig):
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=max(steps, 2) + 1,  # Lightning steps once more after the last update
            pct_start=config.peak_at,
            anneal_strategy=config.anneal,
            div_factor=config.initial_division,
            final_div_factor=config.final_division,
            cycle_momentum=config.cycle_momentum,
        )
    warmup = round(config.warmup_epochs * steps_per_epoch)
    factor = _factor(config, steps, steps_per_epoch, warmup)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) * factor(step))


def _factor(config: ScheduleConfig, steps: int, steps_per_epoch: int, warmup: int) -> Callable[[int], float]:
    if isinstance(config, CosineConfig):
        last = config.final_fraction

        def cosine(step: int) -> float:
            share = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
            return last + (1 - last) * (1 + math.cos(math.pi * share)) / 2

        return cosine
    if isinstance(config, StepConfig):
        every, drop = config.every_epochs * steps_per_epoch, config.factor
        return lambda step: drop ** (step // every)
    return lambda step: 1.0
