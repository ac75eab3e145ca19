"""From a recipe and data to what is fitted: the whole network, the part that is trained, and what it sees."""

from __future__ import annotations

import torch

from cnn_tuning.config import Recipe
from cnn_tuning.data.batches import SplitData
from cnn_tuning.data.packed import PackedData
from cnn_tuning.models.bundle import Specification
from cnn_tuning.models.network import Network
from cnn_tuning.training.features import HeadNetwork, features_of, uses_cache
from cnn_tuning.training.finetune import finetuning_of
from cnn_tuning.training.start import first_network


def assemble(
    recipe: Recipe,
    data: PackedData,
    specification: Specification,
    device: torch.device,
    precision: str,
    name: str,
    *,
    blank: bool = False,
) -> tuple[Network, Network, SplitData]:
    """Return the network with its first weights by torch's seed, the part that is trained, and its data.

    The part is the head on the frozen backbone's features where that gives the same; `name` begins what is told.
    `blank`: pretrained weights are left out, as others will be set.
    """
    network = specification.build() if blank else first_network(specification)
    if recipe.trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if not uses_cache(recipe):
        return network, network, data
    finetuning_of(network, recipe)
    features = features_of(recipe, data, network, device, precision, name)
    return network.cpu(), HeadNetwork(network.body.head), features
