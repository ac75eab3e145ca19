"""Runs as they were recorded: a tracking configuration comes in, `Recorded` runs of store and spool go out."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import TrackingConfig
from cnn_tuning.errors import UserError, redact
from cnn_tuning.tracking import spool, store
from cnn_tuning.tracking.replay import PARENT_TAG, RUN_TAG, param_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000
# Of these there are many a run, and each is part of another run's figures.
INNER = ("arm", "trial")


@dataclass
class Recorded:
    """One run. `key` names it in the spool, `parent` is the key of the run that it belongs to ("": none).

    `id` is the one in the store, or the key where the run is in the spool only. `started`: seconds since 1970.
    """

    id: str
    key: str
    name: str
    status: str
    started: float
    parent: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return train, tune, evaluate and so on."""
        return self.tags.get("cnn_tuning.kind", "")


def read_runs(config: TrackingConfig, *, inner: bool = False) -> list[Recorded]:
    """Return the runs of the configured experiment, oldest first; those not delivered yet come from the spool.

    `inner`: arms and trials, too.

    Raises:
        UserError: the store does not answer.
    """
    uri = store.tracking_uri(config)
    found = _of_store(uri, config.experiment, inner)
    known = {run.key for run in found}
    waiting = (run for run in _of_spool(Path(config.spool), config.experiment, uri) if run.key not in known)
    found += [run for run in waiting if inner or run.kind not in INNER]
    return sorted(found, key=lambda run: run.started)


def _of_store(uri: str, experiment: str, inner: bool) -> list[Recorded]:
    path, problem = store.sqlite_path(uri), store.problem_of(uri)
    if problem:
        raise UserError(f"tracking store {redact(uri)} is not reachable ({problem}): start it or set tracking.uri")
    if path is not None and not path.exists():
        return []
    client = store.open_store(uri)
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(experiment)
        return [_recorded(run) for run in _search(client, found.experiment_id, inner)] if found else []
    except MlflowException as error:
        raise UserError(f"tracking store {redact(uri)}: {store.one_line(error)}") from None


def _search(client: MlflowClient, experiment: str, inner: bool) -> list[Run]:
    left_out = "" if inner else " and ".join(f"tags.`cnn_tuning.kind` != '{kind}'" for kind in INNER)
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], filter_string=left_out, max_results=PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _recorded(run: Run) -> Recorded:
    tags = run.data.tags
    return Recorded(
        id=run.info.run_id,
        key=tags.get(RUN_TAG, run.info.run_id),
        name=run.info.run_name or "",
        status=run.info.status,
        started=(run.info.start_time or 0) / 1000,
        parent=tags.get(PARENT_TAG, ""),
        tags=tags,
        params=run.data.params,
        metrics=run.data.metrics,
    )


def _of_spool(folder: Path, experiment: str, uri: str) -> list[Recorded]:
    """Return the runs that this store has not taken in to their end."""
    found = []
    for key in spool.keys(folder):
        if spool.progress_of(folder, key).get(redact(uri), spool.Progress()).ended:
            continue
        start = spool.start_of(folder, key)
        if start is not None and start["experiment"] == experiment:
            found.append(_replayed(folder, key, start))
    return found


def _replayed(folder: Path, key: str, start: Mapping[str, Any]) -> Recorded:
    tags: dict[str, str] = dict(start["tags"])
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    status = "RUNNING" if start.get("host") == platform.node() else "SPOOLED"
    for event, _ in spool.read(folder / f"{key}.jsonl", 0):
        match event["event"]:
            case "tags":
                tags |= {name: str(value) for name, value in event["values"].items()}
            case "params":
                params |= {name: param_text(value) for name, value in event["values"].items()}
            case "metrics":
                metrics |= event["values"]
            case "dataset":
                tags[f"data.{event['split']}"] = f"{event['name']} {event['digest']}"
            case "finish":
                status = event["status"]
    at, parent = start["at"] / 1000, start["parent"] or ""
    return Recorded(key, key, start["name"], status, at, parent, tags, params, metrics)
