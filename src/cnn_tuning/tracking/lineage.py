"""Lineage: from a registered version back to its run, commit, data and resolved configuration.

Command: `cnn-tuning show models:/mnist-classifier@champion`
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import TrackingConfig
from cnn_tuning.errors import UserError, redact
from cnn_tuning.tracking import store
from cnn_tuning.tracking.facts import code_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Lineage:
    """Where a registered version comes from; `data` has (split, name, digest, source) of each data set."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: datetime
    run_id: str
    run_name: str
    commit: str
    dirty: bool
    data: tuple[tuple[str, str, str, str], ...]
    configuration: dict[str, Any]
    metrics: dict[str, float]
    gate: str
    tags: dict[str, str]


def lineage(model_uri: str, config: TrackingConfig) -> Lineage:
    """Read back the lineage of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: the URI is no such name, the store does not answer, or it knows no such model; says what it has.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if match is None:
        raise UserError(f"{model_uri!r} names no model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    uri = store.tracking_uri(config)
    problem = store.problem_of(uri)
    if problem:
        raise UserError(f"tracking store {uri} is not reachable ({problem}): start it or set tracking.uri")
    path = store.sqlite_path(uri)
    if path is not None and not path.exists():
        raise UserError(f"no tracking store {uri} yet: run `dvc repro` first, or set tracking.uri")
    client = store.open_store(uri)
    return _read(client, _find(client, *match.groups()))


def describe(lineage: Lineage) -> str:
    """Return the lineage as a short page of text."""
    names = "".join(f" @{alias}" for alias in lineage.aliases)
    lines = [
        f"models:/{lineage.name}/{lineage.version}{names}",
        f"  created    {lineage.created:%Y-%m-%d %H:%M:%S %Z}",
        f"  gate       {lineage.gate}",
        f"  run        {lineage.run_id} ({lineage.run_name})",
        f"  commit     {lineage.commit}{' + uncommitted changes' if lineage.dirty else ''}",
    ]
    lines += [f"  data       {split}: {name} {digest} from {place}" for split, name, digest, place in lineage.data]
    configuration = {k: v if isinstance(v, str) else json.dumps(v) for k, v in lineage.configuration.items()}
    metrics = {k: f"{v:.6g}" for k, v in lineage.metrics.items()}
    for title, values in (("metrics", metrics), ("tags", lineage.tags), ("configuration", configuration)):
        if values:
            width = max(map(len, values))
            lines += [f"  {title}", *(f"    {key:<{width}}  {value}" for key, value in sorted(values.items()))]
    return redact("\n".join(lines))


def _find(client: MlflowClient, name: str, alias: str | None, number: str | None) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise UserError(f"tracking store: {store.one_line(error)}") from None
    wanted = f"models:/{name}@{alias}" if alias else f"models:/{name}/{number}"
    known = [
        f"models:/{model.name}" + (f"@{'|'.join(model.aliases)}" if model.aliases else " (no alias)")
        for model in client.search_registered_models()
    ]
    raise UserError(f"{wanted} is not registered; the store has {', '.join(known) or 'no models'}")


def _read(client: MlflowClient, version: ModelVersion) -> Lineage:
    if not version.run_id:
        raise UserError(
            f"models:/{version.name}/{version.version} was registered without a run: it has no lineage"
        )
    run = client.get_run(version.run_id)
    tags = dict(version.tags)
    gate = tags.pop("gate", "no gate was passed: registered by other means")
    commit, dirty = code_of({**run.data.tags, **tags})
    return Lineage(
        name=version.name,
        version=str(version.version),
        aliases=tuple(version.aliases),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        run_id=version.run_id,
        run_name=run.info.run_name,
        commit=commit,
        dirty=dirty,
        data=tuple(_data(run)),
        configuration={k: _value(v) for k, v in run.data.params.items()},
        metrics={k: v for k, v in run.data.metrics.items() if k.startswith("test/")},
        gate=gate,
        tags={k: v for k, v in tags.items() if not k.startswith(("mlflow.", "git."))},
    )


def _data(run: Any) -> list[tuple[str, str, str, str]]:
    found = []
    for entry in run.inputs.dataset_inputs:
        split = next((tag.value for tag in entry.tags if tag.key == "mlflow.data.context"), "")
        whole = run.data.tags.get(f"data.{split}", "").rpartition(" ")[2]
        source = json.loads(entry.dataset.source).get("uri", "")
        found.append((split, entry.dataset.name, whole or entry.dataset.digest, source))
    return sorted(found)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
