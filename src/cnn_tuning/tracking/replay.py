"""Replay: the events of one run go to a store, in order, from where it last acknowledged.

Each event can be sent twice without a trace (the store ignores equal metric rows, parameters and tags; runs,
models and versions are found again by tag), so "at least once" is "exactly once" to the reader.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.errors import UserError
from cnn_tuning.tracking import spool as spools
from cnn_tuning.tracking.spool import Progress
from cnn_tuning.tracking.store import experiment_id, is_permanent, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

RUN_TAG = "cnn_tuning.run"
PARENT_TAG = "cnn_tuning.parent"
PARAM_LENGTH = 6000  # MLflow's limit


@dataclass
class _Batch:
    metrics: list[Metric] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    tags: list[RunTag] = field(default_factory=list)

    def is_full(self) -> bool:
        return len(self.metrics) > 700 or len(self.params) > 0 or len(self.tags) > 50


class Replay:
    """One run on its way into one store.

    `save` is called whenever the store has acknowledged more, `rest` after a full batch with the processor's
    seconds that it took.
    """

    def __init__(
        self,
        spool: Path,
        key: str,
        uri: str,
        client: MlflowClient,
        progress: Progress,
        save: Callable[[], None],
        rest: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.spool, self.key, self.uri, self.client = spool, key, uri, client
        self.progress, self.save, self.rest = progress, save, rest
        self.events, self.folder = spool / f"{key}.jsonl", spool / key

    @property
    def run_id(self) -> str:
        """The run in the store; every spool begins with the event that makes it."""
        assert self.progress.run_id is not None
        return self.progress.run_id

    def deliver(self) -> None:
        """Send what is new; raises what the store raised when it is worth another try later."""
        for name, path in (("offset", self.events), ("system_offset", self.folder / "system.jsonl")):
            batch = _Batch()
            end = getattr(self.progress, name)
            for event, end in spools.read(path, end):  # noqa: B020 - the last end is what is acknowledged
                if not self._collect(batch, event):
                    self._send(batch)
                    batch = _Batch()
                    self._attempt(event)
                if batch.is_full() or not (batch.metrics or batch.params or batch.tags):
                    full, began = batch.is_full(), time.process_time()
                    self._send(batch)
                    batch = _Batch()
                    self._acknowledge(name, end)
                    if full:
                        self.rest(time.process_time() - began)
            self._send(batch)
            if end != getattr(self.progress, name):
                self._acknowledge(name, end)

    def end_dead(self) -> None:
        """End the run of a process that is gone without a word; a later end in its spool still counts."""
        events = [event for event, _ in spools.read(self.events, 0)]
        last_at = max(event["at"] for event in events)
        seconds, usd = spools.spent(events)
        values = {"time/seconds": seconds, "cost/usd": usd}
        self._single({"event": "metrics", "at": last_at, "step": 0, "values": values})
        self._single(
            {
                "event": "finish",
                "at": last_at,
                "status": "KILLED",
                "error": "the process ended without a word: killed, or the machine stopped",
            }
        )
        self.progress.ended = True
        self.save()

    def _acknowledge(self, name: str, end: int) -> None:
        setattr(self.progress, name, end)
        self.save()

    def _collect(self, batch: _Batch, event: dict[str, Any]) -> bool:
        """Add an event to a batch; False if it is none that goes in batches."""
        from mlflow.entities import Metric, Param, RunTag

        match event["event"]:
            case "metrics":
                at, step = event["at"], event["step"]
                batch.metrics += [Metric(k, v, at, step) for k, v in event["values"].items()]
            case "params":
                batch.params += [Param(k, param_text(v)) for k, v in event["values"].items()]
            case "tags":
                batch.tags += [RunTag(k, str(v)) for k, v in event["values"].items()]
            case _:
                return False
        return True

    def _send(self, batch: _Batch) -> None:
        for name, limit in (("tags", 100), ("params", 100), ("metrics", 1000)):
            values = getattr(batch, name)
            for i in range(0, len(values), limit):
                self._send_part(name, values[i : i + limit])

    def _send_part(self, name: str, values: list) -> None:
        """Send one list; what the store refuses for good is found by halving, noted and left out."""
        try:
            send: dict[str, Any] = {name: values}
            self.client.log_batch(self.run_id, **send)
        except Exception as error:
            if not is_permanent(error):
                raise
            if len(values) == 1:
                self._reject(f"{name} {values[0].key}: {one_line(error)}")
                return
            middle = len(values) // 2
            self._send_part(name, values[:middle])
            self._send_part(name, values[middle:])

    def _attempt(self, event: dict[str, Any]) -> None:
        try:
            self._single(event)
        except Exception as error:
            if not is_permanent(error):
                raise
            reason = one_line(error)
            if event["event"] == "register":
                said = {"reason": f"not registered: {reason}", "promoted": False, "refused": True}
                self.progress.registered = {"name": event["name"], "alias": event["alias"], **said}
            self._reject(f"{event['event']}: {reason}")

    def _reject(self, reason: str) -> None:
        self.progress.rejected = [*self.progress.rejected, reason][-20:]
        try:
            self.client.set_tag(self.run_id, "cnn_tuning.rejected", "; ".join(self.progress.rejected)[:4000])
        except Exception as error:
            if not is_permanent(error):
                raise

    def _single(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self.progress.run_id = self._run_of(event)
                self.save()
            case "metrics":
                batch = _Batch()
                self._collect(batch, event)
                self._send(batch)
            case "dataset":
                self._dataset(event)
            case "artifact":
                self._artifact(event)
            case "register":
                from cnn_tuning.tracking.registry import register

                self.progress.registered = register(self.client, self.uri, self.run_id, event, self.folder)
            case "finish":
                if event.get("error"):
                    self.client.set_tag(self.run_id, "cnn_tuning.error", event["error"][:4000])
                self._remove_doubles()
                self.client.set_terminated(self.run_id, event["status"], end_time=event["at"])
                self.progress.ended = True
            case "resume":
                self.client.update_run(self.run_id, status="RUNNING")
                self.progress.ended = False
            case "unreadable":
                self._reject("a line of the spool is not readable")

    def _run_of(self, start: dict[str, Any]) -> str:
        """Find the run by its tag, or create it."""
        experiment = experiment_id(self.client, self.uri, start["experiment"])
        found = self._search(experiment, self.key)
        if found:
            return found[0]
        tags = {**start["tags"], RUN_TAG: self.key}
        if start["parent"]:
            tags[PARENT_TAG] = start["parent"]
            parents = self._search(experiment, start["parent"])
            if parents:
                tags["mlflow.parentRunId"] = parents[0]
        run = self.client.create_run(experiment, start_time=start["at"], tags=tags, run_name=start["name"])
        return run.info.run_id

    def _search(self, experiment: str, key: str) -> list[str]:
        runs = self.client.search_runs(
            [experiment], filter_string=f"tags.`{RUN_TAG}` = '{key}'", order_by=["attributes.start_time ASC"]
        )
        return [run.info.run_id for run in runs]

    def _remove_doubles(self) -> None:
        """Remove a second run made by a request that a hanging server carried out after its repetition."""
        run = self.client.get_run(self.run_id)
        for run_id in self._search(run.info.experiment_id, self.key):
            if run_id != self.run_id:
                self.client.delete_run(run_id)

    def _dataset(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = event["source"]
        kind = next((s for s in ("s3", "https", "http") if source.startswith(f"{s}://")), "local")
        # MLflow keeps 36 characters of a digest; the whole one stands in the run's tags.
        dataset = Dataset(event["name"], event["digest"][:36], kind, json.dumps({"uri": source}))
        tags = [InputTag("mlflow.data.context", event["split"])]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])
        self.client.set_tag(self.run_id, f"data.{event['split']}", f"{event['name']} {event['digest']}")

    def _artifact(self, event: dict[str, Any]) -> None:
        path, folder = self.folder / event["file"], event["folder"] or None
        if not path.exists():
            raise UserError(f"{path.name} is no longer in the spool: the run's own store has it")
        if path.is_dir():
            inside = f"{folder}/{path.name}" if folder else path.name
            self.client.log_artifacts(self.run_id, str(path), inside)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)


def param_text(value: Any) -> str:
    """Return a parameter as the store keeps it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
