"""Bring the data set's files, verified, into `data/raw/`: `python -m cnn_tuning.stages.fetch [data=NAME]`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from cnn_tuning.config import DataConfig
from cnn_tuning.data.sources import fetch
from cnn_tuning.stages.command import Place, stage


@dataclass(frozen=True)
class FetchConfig:
    """The sections that this stage reads."""

    data: DataConfig


def run(config: FetchConfig, place: Place) -> None:
    """Fetch from the first source that has the files."""
    for name, uri in fetch(config.data, place.outputs / place.raw).items():
        click.echo(f"{place.outputs / place.raw / name}: from {uri}")


if __name__ == "__main__":
    stage(FetchConfig, run, "Fetch the data set's files from the first source that has them, verified.")
