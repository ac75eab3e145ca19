"""What data and best network show: prepared data and a network in, a `Data` out. The test split stays closed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cnn_tuning.config import Recipe
from cnn_tuning.data.batches import training_images
from cnn_tuning.data.packed import PackedData, PackedSplit, class_counts
from cnn_tuning.data.repeats import digests_of, image_digests, repetitions, shared_images
from cnn_tuning.diagnosis.recording import Data, Floats, Integers
from cnn_tuning.models.network import Network
from cnn_tuning.training.features import FeatureData, HeadNetwork

# Training images, evenly spread, whose pixels are measured as the network's body gets them.
INPUT_IMAGES = 2000


def gather(
    network: nn.Module,
    data: PackedData,
    recipe: Recipe,
    device: torch.device,
    features: FeatureData | None = None,
) -> Data:
    """Return the evidence of training and validation split; `network` is left where and as it is.

    `features`: what its frozen backbone makes of the pictures, if that is known. Of a streamed training split a
    part is looked at, as large as the validation split.
    """
    val = data.split("val")
    train = training_images(data, recipe, recipe.trainer.train_eval_samples or len(val))
    moved = copy.deepcopy(network).to(device).eval()
    size = recipe.trainer.eval_batch_size
    mean, std = input_statistics(moved, train, size, device)
    if recipe.trainer.stream is None:
        digests, counts = digests_of(data, "train"), class_counts(train.labels, len(data.meta.classes))
    else:
        digests, counts = image_digests(train.images), data.meta.counts["train"]
    repeated, conflicting = repetitions(digests, train.labels)
    return Data(
        classes=tuple(data.meta.classes),
        counts=np.array(counts, np.int64),
        input_mean=mean,
        input_std=std,
        labels=np.array(val.labels, np.int64),
        probabilities=probabilities(*_answering(moved, val, features), size, device),
        shared=shared_images(digests, digests_of(data, "val")),
        repeated=repeated,
        conflicting=conflicting,
        compared=len(digests),
    )


def _answering(
    network: nn.Module, val: PackedSplit, features: FeatureData | None
) -> tuple[nn.Module, PackedSplit]:
    """Return what is asked about the validation images, and as what it takes them."""
    if features is None:
        return network, val
    return HeadNetwork(cast(Network, network).body.head).eval(), features.split("val")


@torch.no_grad()
def probabilities(network: nn.Module, split: PackedSplit, size: int, device: torch.device) -> Floats:
    """Return the network's probabilities for all images of a split, N×C."""
    rows = np.arange(len(split))
    parts = [network(images).float().softmax(1).cpu() for images in _batches(split, rows, size, device)]
    return torch.cat(parts).numpy()


@torch.no_grad()
def input_statistics(
    network: nn.Module, split: PackedSplit, size: int, device: torch.device
) -> tuple[Floats, Floats]:
    """Return mean and standard deviation per channel of what enters the network's body (or the network)."""
    sums: list[Tensor] = []
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), INPUT_IMAGES)).astype(np.int64))
    for images in _batches(split, rows, size, device):
        pixels = (network.normalised(images) if isinstance(network, Network) else images).double()
        count = torch.full((pixels.shape[1],), pixels.numel() / pixels.shape[1], device=pixels.device)
        dimensions = (0, 2, 3)
        sums.append(torch.stack([count.double(), pixels.sum(dimensions), pixels.square().sum(dimensions)]))
    count, total, squares = torch.stack(sums).sum(0).cpu().numpy()
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), std.astype(np.float32)


def _batches(split: PackedSplit, rows: Integers, size: int, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield torch.from_numpy(np.array(split.images[rows[start : start + size]])).to(device)
