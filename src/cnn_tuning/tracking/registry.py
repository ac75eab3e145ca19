"""The registry: a saved model becomes a version, and the alias moves to it when the gate lets it.

Everything here is found again by the event's tag, so a repeated call after a crash makes nothing twice.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import TrackingConfig
from cnn_tuning.errors import UserError, redact
from cnn_tuning.tracking.gate import BY_HAND, PREDICTIONS, Gate, Verdict, decide, read_predictions
from cnn_tuning.tracking.store import DENIED, open_store, refused, sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

EVENT_TAG = "cnn_tuning.event"
# On a version: the SHA-256 of its bundle's model.json, which names that of the weights. It is kept apart from the
# files, so that who may write only those cannot put others in their place.
BUNDLE_TAG = "cnn_tuning.bundle_sha256"
ATTEMPTS = 5
KEPT_MOVING = "not promoted: the alias kept moving; register again"
SETTLE_S = 1.0  # longer than a request takes that another host sends after it has looked at the alias


def register(client: MlflowClient, uri: str, run_id: str, event: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Register the model of a `register` event as a version and put it through the gate.

    Returns:
        `{"name", "alias", "version", "promoted", "reason"}`; no version where the user may not make one.
    """
    from mlflow.exceptions import MlflowException

    client.log_artifact(run_id, str(folder / event["predictions"]), PREDICTIONS.rpartition("/")[0])
    model_id = _logged_model(client, run_id, event, folder / event["model"])
    name = event["name"]
    result = {"name": name, "alias": event["alias"]}
    try:
        _make_registered_model(client, name)
        version = _version(client, run_id, event, model_id)
        result["version"] = str(version.version)
        with _one_at_a_time(uri):
            reason = client.get_model_version(name, version.version).tags.get("gate")
            verdict = Verdict(reason.startswith("promoted"), reason) if reason else None
            if verdict is None:
                wait_s = 0.0 if sqlite_path(uri) else SETTLE_S
                verdict = _pass_gate(client, event, version, folder / event["predictions"], wait_s)
    except MlflowException as error:
        if error.error_code != DENIED:
            raise
        verdict = Verdict(False, f"not promoted: {refused(f'EDIT on registered model {name}')}")
    return {**result, "promoted": verdict.promoted, "reason": verdict.reason}


def promote(model_uri: str, alias: str, config: TrackingConfig) -> str:
    """Move the alias by hand, past the gate, and note that on the version; return what was done.

    Raises:
        UserError: there is no such version, the store does not answer, or the user may not.
    """
    from mlflow.exceptions import MlflowException

    from cnn_tuning.tracking.lineage import lineage

    found = lineage(model_uri, config)
    client = open_store(tracking_uri(config))
    try:
        client.set_registered_model_alias(found.name, alias, found.version)
        reason = f"promoted by hand; before: {found.gate}"
        client.set_model_version_tag(found.name, found.version, "gate", reason)
    except MlflowException as error:
        if error.error_code != DENIED:
            raise
        lacking = refused(f"EDIT on registered model {found.name}")
        raise UserError(f"{model_uri} is not promoted: {lacking}") from None
    return f"models:/{found.name}@{alias} is version {found.version} now"


def champion_of(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version an alias stands for, None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _make_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _logged_model(client: MlflowClient, run_id: str, event: dict[str, Any], model: Path) -> str:
    """Upload a model folder as the run's logged model, once."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run = client.get_run(run_id)
    found = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"tags.`{EVENT_TAG}` = '{event['id']}'", max_results=1
    )
    logged = (
        found[0]
        if found
        else client.create_logged_model(
            run.info.experiment_id,
            name="model",
            source_run_id=run_id,
            tags={**event["tags"], EVENT_TAG: event["id"]},
            params={k: v[:500] for k, v in run.data.params.items()},
            model_type="classifier",
        )
    )
    if str(logged.status) == "READY":
        return logged.model_id
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.log_model_artifacts(logged.model_id, str(model))
    saved = Model.load(str(model))
    saved.run_id, saved.model_id, saved.artifact_path = run_id, logged.model_id, logged.artifact_location
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "MLmodel"
        saved.save(str(path))
        client.log_model_artifact(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, "READY")
    return logged.model_id


def _version(client: MlflowClient, run_id: str, event: dict[str, Any], model_id: str) -> ModelVersion:
    found = _versions(client, event)
    if not found:
        client.create_model_version(
            event["name"],
            f"models:/{model_id}",
            run_id=run_id,
            tags={**event["tags"], EVENT_TAG: event["id"]},
            description=event["description"],
            model_id=model_id,
        )
        found = _versions(client, event)
    # A request that timed out at a hanging server may still be carried out, after its repetition.
    for double in found[1:]:
        client.delete_model_version(event["name"], double.version)
    return found[0]


def _versions(client: MlflowClient, event: dict[str, Any]) -> list[ModelVersion]:
    found = client.search_model_versions(f"name = '{event['name']}' and tags.`{EVENT_TAG}` = '{event['id']}'")
    return sorted(found, key=lambda version: int(version.version))


def _pass_gate(
    client: MlflowClient, event: dict[str, Any], version: ModelVersion, predictions: Path, settle_s: float
) -> Verdict:
    """Compare with the champion, move the alias if the gate opens, and write the reason on the version.

    A server offers no compare-and-set on an alias. So the alias is read again just before it is set and a while
    (`settle_s`) after, and who finds another version there compares with that one: of two hosts that promote at
    the same moment the better one stays.
    """
    name, alias, gate = event["name"], event["alias"], Gate(**event["gate"])
    verdict = Verdict(False, KEPT_MOVING)
    for _ in range(ATTEMPTS):
        champion = champion_of(client, name, alias)
        if champion is not None and str(champion.version) == str(version.version):
            break
        verdict = _compare(client, champion, predictions, gate)
        if not verdict.promoted:
            break
        if _number(champion_of(client, name, alias)) != _number(champion):
            continue
        client.set_registered_model_alias(name, alias, str(version.version))
        time.sleep(settle_s)
        if _number(champion_of(client, name, alias)) == _number(version):
            break
    has_it = _number(champion_of(client, name, alias)) == _number(version)
    if has_it and not verdict.promoted:
        verdict = Verdict(True, "promoted: it has the alias already")
    elif verdict.promoted and not has_it:
        verdict = Verdict(False, KEPT_MOVING)
    description = f"{event['description']}\n\n{verdict.reason}".strip()
    client.update_model_version(name, str(version.version), description=description)
    client.set_model_version_tag(name, str(version.version), "gate", verdict.reason)
    return verdict


def _compare(client: MlflowClient, champion: ModelVersion | None, predictions: Path, gate: Gate) -> Verdict:
    from mlflow.exceptions import MlflowException

    challenger = read_predictions(predictions)
    figures = f"{challenger.accuracy:.2%} on {len(challenger.answers)} test images"
    if gate.barred:
        return Verdict(False, f"not promoted: {gate.barred} ({figures}); {BY_HAND}")
    if champion is None:
        return Verdict(True, f"promoted: first champion, {figures}")
    nothing = f"not promoted: version {champion.version} has no readable predictions to compare with; "
    if not champion.run_id:
        return Verdict(False, nothing + BY_HAND)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            held = read_predictions(Path(client.download_artifacts(champion.run_id, PREDICTIONS, scratch)))
        except (UserError, FileNotFoundError):
            return Verdict(False, nothing + BY_HAND)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise
            return Verdict(False, nothing + BY_HAND)
    return decide(challenger, held, str(champion.version), gate)


def _number(version: ModelVersion | None) -> str | None:
    return None if version is None else str(version.version)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Let one process of this host at a time through the gate of a store; among hosts the gate looks again."""
    from filelock import FileLock

    path = sqlite_path(uri)
    if path is None:
        # A user's own: in a folder that all may write nobody can open another's file.
        user = os.getuid() if hasattr(os, "getuid") else ""
        name = hashlib.sha256(f"{user} {redact(uri)}".encode()).hexdigest()
        path = Path(tempfile.gettempdir()) / f"cnn-tuning-{name[:16]}"
    with FileLock(f"{path}.registry.lock", timeout=300):
        yield
