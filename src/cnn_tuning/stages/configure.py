"""Compose `params.yaml` and `conf/` into `params.lock.yaml`: `python -m cnn_tuning.stages.configure`."""

from __future__ import annotations

import click

from cnn_tuning import config
from cnn_tuning.stages.command import run_command


@click.command()
def configure() -> None:
    """Compose params.yaml and conf/, check every value, and write params.lock.yaml."""
    composed = config.compose()
    config.LOCK.write_text(config.lock_text(composed))
    click.echo(f"{config.LOCK}: experiment {composed.experiment}, seed {composed.seed}")


if __name__ == "__main__":
    run_command(configure)
