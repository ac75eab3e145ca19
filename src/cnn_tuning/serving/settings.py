"""What serving needs of the configuration: overrides in, its own sections of `conf/` and `params.yaml` out.

A mistake in another section of `params.yaml` stops no server, and a model in a folder needs no project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cnn_tuning.config import (
    CONF,
    PARAMS,
    RegistryConfig,
    ServingConfig,
    TrackingConfig,
    compose_sections,
    flatten,
    patch,
)
from cnn_tuning.config.check import Section
from cnn_tuning.config.values import read_overrides
from cnn_tuning.errors import UserError


@dataclass(frozen=True)
class Local:
    """For a model in a folder."""

    serving: ServingConfig


@dataclass(frozen=True)
class Registered:
    """For a model in the registry."""

    serving: ServingConfig
    tracking: TrackingConfig
    registry: RegistryConfig


def settings(kind: type[Section], overrides: Sequence[str] = ()) -> Section:
    """Return the sections that `kind` declares; without a project, `Local` gets the defaults.

    Raises:
        UserError: names every mistake in these sections and in the overrides; no project where one is needed.
    """
    if (CONF / "config.yaml").is_file() and PARAMS.is_file():
        return compose_sections(kind, overrides)
    if kind is not Local:
        remedy = "run this in the project's top folder, or give --model FOLDER"
        raise UserError(f"no {PARAMS} and {CONF}/config.yaml here: {remedy}")
    changes: dict[str, object] = {}
    for _, tree in read_overrides(overrides):
        changes |= flatten(tree)
    return patch(kind(**{"serving": ServingConfig(name="default")}), changes, "override")
