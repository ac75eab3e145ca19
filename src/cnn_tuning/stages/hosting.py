"""`cnn-tuning host plan`: how much an experiment trains, and on which hosts, for how long and how much."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import (
    LOCK,
    Config,
    DataConfig,
    ModelConfig,
    arms,
    compose,
    load_locked,
    recipe_of,
)
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_measured import measured_on_hosts
from cnn_tuning.stages.host_tables import figure, new_table, print_table

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.plan import Measured, Option
    from cnn_tuning.cloud.prices import Market

META = Path("data/prepared/meta.json")
TRAINING = Path("results/training/training.json")
BASIS = {
    "measured": "measured",
    "scaled from a measured run": "scaled",
    "calibration table": "calibrated",
    "unknown": "",
}


@dataclass(frozen=True)
class _Trained:
    data: DataConfig
    model: ModelConfig


def plan(overrides: Sequence[str], measured: Sequence[str], *, as_json: bool) -> None:
    """Print which hosts could run this experiment, for how long and how much."""
    from cnn_tuning.cloud.aws import Aws

    config = compose(overrides)
    planned(config, measured, Aws(config.host.region), as_json=as_json)


def planned(
    config: Config, measured: Sequence[str], aws: Aws, *, as_json: bool = False, by_hand: bool = False
) -> list[Option]:
    """Print the plan and return its options, the best first; `by_hand`: for a host that runs no pipeline."""
    if by_hand:
        options, market = ranked(config, measured, aws, None)
        _print_plan(options)
        for note in market.notes:
            click.echo(note)
        return options
    images, epochs = training_images(config), _epochs(config)
    options, market = ranked(config, measured, aws, epochs)
    if as_json:
        about = {"experiment": config.experiment, "training_images": images, "epochs": epochs,
                 "market": config.host.market, "region": config.host.region, "notes": market.notes}  # fmt: skip
        click.echo(json.dumps({**about, "options": [asdict(option) for option in options]}, indent=1))
        return options
    counted = "an unknown number of" if images is None else f"{images:,}"
    click.echo(f"{config.experiment}: {counted} training images × {epochs:g} epochs in all trainings")
    _print_plan(options)
    if images is None:
        click.echo("Ranked by $ an hour: `dvc repro preprocess` counts the images, and with them come hours.")
    for note in (*market.notes, *_reservations(config, options)):
        click.echo(note)
    return options


def ranked(config: Config, measured: Sequence[str], aws: Aws, epochs: float | None) -> tuple[list[Option], Market]:
    """Return the options for so many epochs (None: nobody knows), the best first, and their market."""
    from cnn_tuning.cloud.plan import Work, rank
    from cnn_tuning.cloud.prices import ask_market

    recorded, notes = measured_on_hosts(config)
    runs = [*_measured_here(config), *recorded, *map(_measured_there, measured)]
    images = training_images(config)
    market = ask_market(aws, config.host.candidates)
    market = replace(market, notes=(*market.notes, *notes))
    work = Work(None if images is None or epochs is None else int(images * epochs), config.model.name)
    return rank(config.host, work, runs, market), market


def _print_plan(options: Sequence[Option]) -> None:
    """Print prices per hour, and hours and what they cost if anybody knows the hours; spot at its cheapest."""
    timed = any(option.hours is not None for option in options)
    known = ("hours", "on demand\n$ in all", "spot\n$ in all") if timed else ()
    table = new_table(
        "type", "GPU", "vCPU", "images/s", "from", "on demand\n$ an hour", "spot\n$ an hour", *known, "quota"
    )
    quota = {True: "ok", False: "too low", None: "?"}
    for option in options:
        figures = (option.hours, option.usd("on-demand"), option.usd("spot")) if timed else ()
        table.add_row(
            option.type,
            option.gpu or "",
            str(option.vcpus),
            figure(option.samples_per_second, ",.0f"),
            BASIS[option.basis],
            figure(option.per_hour("on-demand"), ".3f"),
            figure(option.per_hour("spot"), ".3f"),
            *(figure(value, ".2f") for value in figures),
            quota[option.quota_ok],
        )
    print_table(table)
    _print_spot(options)
    for option in options:
        if option.refused:
            click.echo(f"refused: {option.type}: {option.refused}")


def _print_spot(options: Sequence[Option]) -> None:
    """Print the spot price in each zone, `-` where there is none."""
    zones = sorted({zone for option in options for zone in option.spot_per_hour})
    if not zones:
        return
    table = new_table("spot $ an hour", *zones)
    for option in (option for option in options if option.spot_per_hour):
        prices = (option.spot_per_hour.get(zone) for zone in zones)
        table.add_row(option.type, *("-" if price is None else f"{price:.3f}" for price in prices))
    print_table(table)


def _reservations(config: Config, options: Sequence[Option]) -> list[str]:
    """Return what the figures rest on."""
    told = {option.basis for option in options if not option.refused}
    notes = [f"Hours and $ in all hold {config.host.setup_minutes:g} minutes of setup, disk and address."]
    if "scaled from a measured run" in told:
        notes.append("Scaled from a run measured here by types' relative speeds, which are estimates (conf/host).")
    if "calibration table" in told:
        notes.append(f"From the calibration table, not from a run: {config.host.calibration.source}.")
    if "unknown" in told:
        notes.append(
            "No speed is known for this network: run `dvc repro train` once, or give --measured TYPE=IMAGES_PER_S."
        )
    return notes


def _epochs(config: Config) -> float:
    """Return the epochs of all trainings of the pipeline: at most, since pruning and early stopping save some."""
    recipe = recipe_of(config)
    total = config.trainer.max_epochs
    for question in config.ablation.questions.values():
        total += question.seeds * sum(arm.trainer.max_epochs for arm in arms(recipe, question).values())
    if config.search.space:
        each = config.search.settings.get("trainer.max_epochs", config.trainer.max_epochs)
        total += config.search.budget.trials * config.search.seeds * each
        total += config.search.refit_seeds * config.trainer.max_epochs
    return total


def training_images(config: Config) -> int | None:
    """Return how many images are trained on; None where neither the data nor its configuration say."""
    if META.is_file():
        meta = json.loads(META.read_text())
        if meta["name"] == config.data.name:
            return sum(meta["counts"]["train"])
    count = config.data.limit or (config.data.counts or {}).get("train")
    if count is None:
        return None
    return count - (config.data.val_samples or int(count * config.data.val_fraction))


def _measured_here(config: Config) -> list[Measured]:
    """Return the pipeline's own training, if it was of this network and this size of images, on processors."""
    from cnn_tuning.cloud.plan import Measured

    if not (TRAINING.is_file() and LOCK.is_file()):
        return []
    training = json.loads(TRAINING.read_text())
    try:
        trained = load_locked(_Trained)
    except UserError:
        return []
    same = trained.model == config.model and trained.data.image == config.data.image
    if not same or training["device"] != "cpu":
        return []
    return [Measured(training["samples_per_second"], cores=training["threads"] * training.get("processes", 1))]


def _measured_there(text: str) -> Measured:
    from cnn_tuning.cloud.plan import Measured

    name, _, speed = text.partition("=")
    try:
        return Measured(float(speed), instance_type=name)
    except ValueError:
        raise UserError(f"--measured {text}: must be like g5.xlarge=61000 (images per second)") from None
