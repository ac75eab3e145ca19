"""What serving needs of the configuration: overrides in, its own sections of `conf/` and `params.yaml` out.

A mistake in another section of `params.yaml` stops no server, and a model in a folder needs no project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cnn_tuning.config import (
    CONF,
    PARAMS,
    HostConfig,
    RegistryConfig,
    ServingConfig,
    TrackingConfig,
    compose_sections,
    flatten,
    patch,
)
from cnn_tuning.config.check import Section, report
from cnn_tuning.config.values import read_overrides
from cnn_tuning.errors import UserError

Needed = TypeVar("Needed", bound="Local | Registered")


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


@dataclass(frozen=True)
class Deployed(Registered):
    """For a model in the registry that goes to AWS."""

    host: HostConfig


def champion(serving: ServingConfig, registry: RegistryConfig) -> str:
    """Return the URI of the model that answers unless another one is named."""
    return f"models:/{serving.model or registry.model}@{serving.alias or registry.alias}"


def settings_for(kind: type[Needed], target: str, overrides: Sequence[str] = ()) -> Needed:
    """Return the sections for a target: the option `serving` chosen, if it is made for it, else that named so.

    Without a project there are no options: the defaults serve for any target.

    Raises:
        UserError: as `settings`, and where the overrides choose an option that is made for another target.
    """
    chosen = settings(kind, overrides)
    if chosen.serving.target == target or not _in_project():
        return chosen
    if chosen.serving.target == "local":
        chosen = settings(kind, [f"serving={target}", *overrides])
    if chosen.serving.target != target:
        name, made_for = chosen.serving.name, chosen.serving.target
        raise UserError(f"serving={name} is made for {made_for}: leave it out, or take serving={target}")
    return chosen


def settings(kind: type[Section], overrides: Sequence[str] = ()) -> Section:
    """Return the sections that `kind` declares; without a project, `Local` gets the defaults.

    Raises:
        UserError: names every mistake in these sections and in the overrides; no project where one is needed.
    """
    if _in_project():
        return compose_sections(kind, overrides)
    if kind is not Local:
        remedy = "run this in the project's top folder, or give --model FOLDER"
        raise UserError(f"no {PARAMS} and {CONF}/config.yaml here: {remedy}")
    changes: dict[str, object] = {}
    problems: list[str] = []
    for _, tree in read_overrides(overrides, problems):
        changes |= flatten(tree)
    if problems:
        raise report(problems)
    return patch(kind(**{"serving": ServingConfig(name="default")}), changes, "override")


def _in_project() -> bool:
    return (CONF / "config.yaml").is_file() and PARAMS.is_file()
