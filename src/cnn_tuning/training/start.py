"""What a training begins with: recipe and data in, the network with its first weights and its meaning out."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

from cnn_tuning.config import Recipe
from cnn_tuning.config.check import check_backbone
from cnn_tuning.data.packed import Meta
from cnn_tuning.errors import UserError
from cnn_tuning.models.bundle import Specification
from cnn_tuning.models.network import Network
from cnn_tuning.training import pretrained


def specification_of(recipe: Recipe, meta: Meta) -> Specification:
    """Return what the network will be; a pretrained one sees pixels as it did before.

    Raises:
        UserError: network and training do not go together, or the pretrained weights are not there.
    """
    problems = check_backbone(recipe)
    if problems:
        raise UserError("; ".join(problems))
    specification = meant(recipe, meta)
    if not recipe.model.pretrained:
        return specification
    source = pretrained.source_for(recipe.model)
    channels = meta.image.channels
    if len(source.mean) != channels:
        raise UserError(
            f"the pretrained network takes {len(source.mean)} channels, the pictures have {channels}: "
            f"set data.image.channels: {len(source.mean)}"
        )
    return replace(specification, mean=source.mean, std=source.std)


def meant(recipe: Recipe, meta: Meta) -> Specification:
    """Return what the network is by recipe and data alone."""
    return Specification(
        data_name=meta.name,
        model=recipe.model,
        classes=tuple(meta.classes),
        image=meta.image,
        mean=tuple(meta.mean),
        std=tuple(meta.std),
    )


def first_network(specification: Specification) -> Network:
    """Return the network by torch's seed, with its pretrained weights where it has some."""
    network = specification.build()
    if specification.model.pretrained:
        pretrained.load_into(network.body.trunk)
    return network


@functools.cache
def say_once(line: str) -> None:
    """Say what would be the same for each trial of a search."""
    print(line, file=sys.stderr)


def tell_of_start(recipe: Recipe, specification: Specification) -> None:
    """Say what in a backbone's start may cost accuracy, one line each."""
    model, finetune = recipe.model, recipe.trainer.finetune
    if finetune and finetune.trainable != "all" and not model.pretrained:
        say_once(f"{model.name}: the frozen backbone is not pretrained: its weights are random")
    if not model.pretrained:
        return
    learnt, now = pretrained.source_for(model).interpolation, specification.image.interpolation
    if learnt != now:
        say_once(
            f"{model.name} learnt from pictures resized by {learnt}, these are by {now} (data.image.interpolation)"
        )
