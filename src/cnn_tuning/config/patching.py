"""A configuration with some values replaced, validated again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from cnn_tuning.config.check import Section, report, validated
from cnn_tuning.config.values import Value, assign


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists and scalars, as JSON and YAML hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def patch(config: Section, changes: Mapping[str, Any], place: str = "change") -> Section:
    """Return `config` with values replaced by dotted name, validated again; a wrong name is an error.

    A whole section may be a value; values inside it are set after it. `place` is named in the error.
    """
    problems: list[str] = []
    tree = to_plain(config)
    places: dict[str, str] = {}
    for dotted in sorted(changes, key=lambda name: name.count(".")):
        assign(tree, Value(tuple(dotted.split(".")), changes[dotted], place), places, problems)
    patched = validated(type(config), tree, problems, places)
    if problems or patched is None:
        raise report(problems)
    return patched
