"""The learning-rate range test (Smith 2017, arXiv:1506.01186): recipe and data in, a `Sweep` out.

A loop of its own, not Lightning's tuner: that smooths with a lag, so that all it sees lies at too high a rate,
takes the slope over the rate itself, which favours low rates, and leaves checkpoints behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from cnn_tuning.config import Recipe
from cnn_tuning.data.batches import Batches, Purpose, SplitData, epoch_order, seed_of, training_images
from cnn_tuning.data.packed import PackedData
from cnn_tuning.diagnosis.recording import Floats, Sweep
from cnn_tuning.machine import usable_cores
from cnn_tuning.training.assembly import assemble
from cnn_tuning.training.classifier import training_loss
from cnn_tuning.training.engine import place_of
from cnn_tuning.training.finetune import finetuning_of
from cnn_tuning.training.optimisation import build_optimizer
from cnn_tuning.training.start import specification_of

# The sweep ends at a loss so many times the first, and keeps it as that.
EXPLODED = 2.0
# Width of the smoothing (one standard deviation) in decades of the rate.
WIDTH = 0.15


def range_test(
    recipe: Recipe, data: PackedData, *, steps: int = 100, lowest: float = 1e-6, highest: float = 10.0
) -> Sweep:
    """Train for at most `steps` steps while the rate grows exponentially from `lowest` to `highest`.

    Network, optimizer, batches, precision and clipping are the recipe's; its schedule is not followed.
    The same recipe, data and device give the same sweep, and the process is left as it was.
    """
    device, precision = place_of(recipe)
    rates = np.geomspace(lowest, highest, steps)
    with _apart(recipe, device):
        losses = list(_losses(recipe, data, device, precision, rates))
    per_decade = (steps - 1) / math.log10(highest / lowest)
    smooth = _smoothed(np.array(losses), WIDTH * per_decade)
    return Sweep(rates[: len(losses)].astype(np.float32), smooth.astype(np.float32))


def _losses(
    recipe: Recipe, data: PackedData, device: torch.device, precision: str, rates: np.ndarray
) -> Iterator[float]:
    """Yield the loss of each step before its update, until it explodes."""
    clip = recipe.trainer.gradient_clip
    torch.manual_seed(recipe.seed)
    specification = specification_of(recipe, data.meta)
    _, network, learnt = assemble(recipe, data, specification, device, precision, "range test")
    network = network.to(device).train()
    finetuning = finetuning_of(network, recipe)
    shares = finetuning.shares() if finetuning is not None else None
    optimizer = build_optimizer(network, recipe.optimizer, fused=not clip, shares=shares)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
    limit = math.inf
    for step, (rate, (images, labels)) in enumerate(zip(rates, _batches(recipe, learnt, device, len(rates)))):  # noqa: B905
        torch.manual_seed(seed_of(Purpose.DROPOUT, recipe.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = float(rate) * group["share"]
        with torch.autocast(device.type, _half(precision), enabled=precision != "32-true"):
            loss = training_loss(network(images), labels, recipe.trainer.label_smoothing)
        value = float(loss.detach())
        limit = EXPLODED * value if step == 0 else limit
        if not value < limit:  # nor a number
            yield limit
            return
        yield value
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


def _batches(recipe: Recipe, data: SplitData, device: torch.device, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the recipe's batches for ever, of no more images than so many steps can see."""
    train = training_images(data, recipe, steps * recipe.trainer.batch_size)
    rows = epoch_order(len(train), recipe.seed, 0)[: steps * recipe.trainer.batch_size]
    batches = Batches(train, recipe, device, resident=True, train=True, rows=rows.numpy())
    while True:
        yield from batches


def _smoothed(losses: np.ndarray, width: float) -> Floats:
    """Return the mean with Gaussian weights of `width` steps to both sides, so that nothing is moved."""
    at = np.arange(len(losses))
    weights = np.exp(-(((at[:, None] - at) / max(width, 1e-9)) ** 2) / 2)
    return weights @ losses / weights.sum(1)


def _half(precision: str) -> torch.dtype:
    return torch.float16 if precision == "16-mixed" else torch.bfloat16


@contextmanager
def _apart(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Use the recipe's threads and determinism, and put them and torch's random numbers back afterwards."""
    threads = torch.get_num_threads()
    strict, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.set_num_threads(recipe.trainer.threads or usable_cores())
    torch.use_deterministic_algorithms(recipe.trainer.deterministic, warn_only=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
