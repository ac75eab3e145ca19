"""Compose `params.yaml` and `conf/`: `python -m cnn_tuning.stages.configure [OVERRIDES]` prints the result."""

from __future__ import annotations

import click

from cnn_tuning import config
from cnn_tuning.diagnosis.judge import check_rules
from cnn_tuning.errors import UserError
from cnn_tuning.stages.command import run_command


@click.command()
@click.argument("overrides", nargs=-1)
@click.option("--locked", is_flag=True, help="Write params.lock.yaml, as the pipeline does.")
def configure(overrides: tuple[str, ...], locked: bool) -> None:
    """Compose params.yaml, conf/ and OVERRIDES, check every value, and print the result."""
    if locked and overrides:
        raise UserError("--locked takes no overrides: edit params.yaml, or leave --locked out")
    composed = config.compose(overrides)
    check_rules(composed.diagnosis)
    text = config.lock_text(composed)
    if locked:
        config.LOCK.write_text(text)
        text = f"{config.LOCK}: experiment {composed.experiment}, seed {composed.seed}"
    click.echo(text)


if __name__ == "__main__":
    run_command(configure)
