"""`cnn-tuning host plan --nodes 1,2,4`: what several hosts would make of one training, and their cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import Config, compose, recipe_of
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import figure, new_table, print_table
from cnn_tuning.stages.hosting import META, ranked, training_images

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.plan import Option
    from cnn_tuning.cloud.scaling import Scaled

MOST = 1024


def plan_nodes(overrides: Sequence[str], measured: Sequence[str], nodes: str, *, as_json: bool) -> None:
    """Print what each number of hosts of the best type would make of the training that `train` makes."""
    from cnn_tuning.cloud.aws import Aws

    config, counts = compose(overrides), _counts(nodes)
    show_nodes(config, counts, measured, Aws(config.host.region), as_json=as_json)


def show_nodes(
    config: Config, counts: Sequence[int], measured: Sequence[str], aws: Aws, *, as_json: bool = False
) -> None:
    """Print the predictions."""
    options, _ = ranked(config, measured, aws, config.trainer.max_epochs)
    option, weights, batch = _best(options), _weights(config), config.trainer.batch_size
    predictions = predicted(config, option, counts, training_images(config), weights)
    network = config.host.types[option.type].network_gbit
    if as_json:
        about = {"experiment": config.experiment, "type": option.type, "basis": option.basis, "weights": weights,
                 "network_gbit": network, "batch": batch}  # fmt: skip
        click.echo(json.dumps({**about, "nodes": [asdict(one) for one in predictions]}, indent=1))
        return
    click.echo(
        f"{config.experiment} on {option.type} ({option.basis}), {config.host.market}: {weights:,} weights, "
        f"batches of {batch} shared by all, {network:g} Gbit/s"
    )
    _print(predictions)


def predicted(
    config: Config, option: Option, counts: Sequence[int], images: int | None, weights: int
) -> list[Scaled]:
    """Return what each number of hosts would make of the training.

    Raises:
        UserError: a speed, the number of images or the type's network is not known.
    """
    from cnn_tuning.cloud.plan import extras_per_hour
    from cnn_tuning.cloud.scaling import GRADIENT_BYTES, Link, Work, predict

    host, kind = config.host, config.host.types.get(option.type)
    if kind is None or kind.network_gbit is None:
        raise UserError(f"{option.type}: network_gbit is missing in host.types: write it in conf/host")
    if option.samples_per_second is None or images is None:
        raise UserError(
            f"{option.type}: no speed is known: run `dvc repro train` once, or give --measured TYPE=IMAGES_PER_S"
        )
    price = option.per_hour(host.market)
    work = Work(
        batch=config.trainer.batch_size,
        images=images * config.trainer.max_epochs,
        samples_per_second=option.samples_per_second,
        gradient_bytes=GRADIENT_BYTES * weights,
    )
    return [
        predict(
            work,
            count,
            Link.of_gbit(kind.network_gbit),
            setup_hours=host.setup_minutes / 60,
            usd_per_hour=None if price is None else price + extras_per_hour(host),
        )
        for count in counts
    ]


def _print(predictions: Sequence[Scaled]) -> None:
    table = new_table("hosts", "ms a step", "of it exchange", "images/s", "efficiency", "hours", "$")
    for one in predictions:
        table.add_row(
            str(one.nodes),
            f"{1000 * one.step_s:.2f}",
            f"{1000 * one.exchange_s:.2f}",
            f"{one.samples_per_second:,.0f}",
            f"{one.efficiency:.0%}",
            f"{one.hours:.2f}",
            figure(one.usd, ".2f"),
        )
    print_table(table)
    click.echo(
        "Predicted, not measured: computing divided evenly, and nothing computed while gradients are exchanged."
    )


def _counts(nodes: str) -> list[int]:
    try:
        counts = [int(part) for part in nodes.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(0 < count <= MOST for count in counts):
        raise UserError(f"--nodes {nodes}: must be numbers from 1 to {MOST}, such as 1,2,4,8")
    return counts


def _best(options: Sequence[Option]) -> Option:
    if not options:
        raise UserError("host.candidates: there are none")
    return next((option for option in options if option.refused is None), options[0])


def _weights(config: Config) -> int:
    """Return how many weights the network has that are learnt."""
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.training.finetune import finetuning_of
    from cnn_tuning.training.start import meant

    recipe = recipe_of(config)
    network = meant(recipe, PackedData.open(META.parent).meta).build()
    finetuning_of(network, recipe)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
