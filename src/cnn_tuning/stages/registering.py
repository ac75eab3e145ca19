"""One evaluated model becomes a run and, in the pipeline, a version of the registered model behind the gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.config import EvaluationConfig, RegistryConfig, TrackingConfig, flatten, to_plain
from cnn_tuning.data.digests import sha256_of
from cnn_tuning.data.packed import PackedData
from cnn_tuning.evaluation.comparison import Comparison
from cnn_tuning.evaluation.metrics import Metrics
from cnn_tuning.evaluation.report import interval
from cnn_tuning.stages.command import Place
from cnn_tuning.stages.lineage import record_data, recorded
from cnn_tuning.tracking.gate import Gate, write_predictions
from cnn_tuning.tracking.registry import BUNDLE_TAG
from cnn_tuning.tracking.run import Delivery, Run

SPLIT = "test"


@dataclass(frozen=True)
class EvaluateConfig:
    """The sections that the stage reads."""

    seed: int
    evaluation: EvaluationConfig
    registry: RegistryConfig
    tracking: TrackingConfig


@dataclass(frozen=True)
class Subject:
    """One model that is evaluated: its folder, its answers, and the facts of its training."""

    name: str
    bundle: Path
    probabilities: NDArray[np.float32]
    training: Mapping[str, Any]
    best: Mapping[str, float]
    seconds: float  # that answering took

    @property
    def answers(self) -> NDArray[np.int64]:
        """Return the index of the most probable class of each image."""
        return self.probabilities.argmax(1)


def record(
    config: EvaluateConfig,
    place: Place,
    data: PackedData,
    subject: Subject,
    metrics: Metrics,
    comparison: Comparison | None,
    out: Path,
) -> Delivery:
    """Log one model's evaluation as a run and, in the pipeline, register the model."""
    name = f"evaluate {subject.name} {data.meta.name}"
    recipe = json.loads((subject.bundle / "recipe.json").read_text())
    settings = {"evaluation": to_plain(config.evaluation), "registry": to_plain(config.registry)}
    # What the model was trained with, which for the tuned one is not what the configuration says.
    params = {**recorded({**recipe, **settings}, place), **flatten(recipe)}
    tags = {"model": subject.name}
    parent = subject.training.get("run")
    with Run.start(
        config.tracking,
        name=name,
        kind="evaluate",
        params=params,
        tags=tags,
        parent=parent,
        already_s=subject.seconds,
    ) as tracked:
        digest = record_data(tracked, place, data, SPLIT)
        tracked.log_metrics(figures(subject, metrics))
        if comparison is not None:
            tracked.log_metrics({f"{SPLIT}/{k}": v for k, v in comparison.flat().items()})
        for file in sorted((out / subject.name).iterdir()):
            tracked.log_artifact(file, "evaluation")
        if place.is_pipeline:
            _register(tracked, config, data, subject, metrics, comparison, out / subject.name, digest)
        return tracked.finish()


def _register(
    tracked: Run,
    config: EvaluateConfig,
    data: PackedData,
    subject: Subject,
    metrics: Metrics,
    comparison: Comparison | None,
    out: Path,
    digest: str,
) -> None:
    from cnn_tuning.tracking.store import quiet_mlflow

    quiet_mlflow()
    from cnn_tuning.models.bundle import MODEL
    from cnn_tuning.serving.pyfunc import save

    meta, split = data.meta, data.split(SPLIT)
    model, predictions = Path(".state/registering/model"), out / "predictions.csv"
    shutil.rmtree(model.parent, ignore_errors=True)
    model.parent.mkdir(parents=True)
    save(subject.bundle, model, np.asarray(split.images[0]))
    confidence = subject.probabilities.max(1)
    rows = zip(range(metrics.count), split.labels.tolist(), subject.answers.tolist(), confidence, strict=True)
    write_predictions(predictions, meta.digests[SPLIT], rows)
    registry = config.registry
    barred = f"{registry.barred}: " if registry.barred else ""
    against = f"; {comparison.sentence('the tuned model', 'the baseline')}" if comparison is not None else ""
    tracked.register(
        model,
        name=registry.model,
        alias=registry.alias,
        predictions=predictions,
        gate=Gate(registry.significance, registry.minimum_gain, registry.barred),
        description=f"{barred}{meta.name}, {subject.name}: test accuracy {metrics.accuracy.value:.2%} "
        f"{interval(metrics.accuracy, '.2%')}{against}",
        tags={
            "data": meta.name,
            "data_digest": digest,
            "train_run": str(subject.training.get("run")),
            "model": subject.name,
            BUNDLE_TAG: sha256_of(subject.bundle / MODEL),
            **({"barred": registry.barred} if registry.barred else {}),
        },
    )
    shutil.rmtree(model.parent, ignore_errors=True)


def registration(delivery: Delivery, config: EvaluateConfig) -> dict[str, Any]:
    return {
        "model": config.registry.model,
        "alias": config.registry.alias,
        "confidence": config.evaluation.confidence,
        "run": delivery.key,
        "spool": config.tracking.spool,
        "uri": delivery.uri,
        "state": delivery.state,
        "run_id": delivery.run_id,
        **(delivery.registered or {}),
    }


def figures(subject: Subject, metrics: Metrics) -> dict[str, float]:
    own = {name: value for name, value in subject.best.items() if "/" in name}
    return {**own, **metrics.flat(SPLIT)}
