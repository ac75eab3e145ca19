"""Measure the model on the test split, report, and register it: `python -m cnn_tuning.stages.evaluate`.

The only stage that opens the test split. By hand it measures and reports below `scratch/` and registers
nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from cnn_tuning.config import EvaluationConfig, RegistryConfig, TrackingConfig, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.evaluation import outcome
from cnn_tuning.evaluation.metrics import Estimate, Metrics, measure
from cnn_tuning.reports import page, plots
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.stages.lineage import data_hash, recorded
from cnn_tuning.tracking.gate import Gate, write_predictions
from cnn_tuning.tracking.run import Delivery, Run

SPLIT = "test"


@dataclass(frozen=True)
class EvaluateConfig:
    """The sections that this stage reads."""

    seed: int
    evaluation: EvaluationConfig
    registry: RegistryConfig
    tracking: TrackingConfig


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the model's folder, its data, its answers, and the training's own facts."""

    bundle: Path
    data: PackedData
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    training: Mapping[str, Any]
    best: Mapping[str, float]


def run(config: EvaluateConfig, place: Place) -> None:
    """Answer every test image once, measure, draw, log and register."""
    out = place.outputs / place.evaluation
    empty_folder(out)
    subject = _answer(place)
    classes = subject.data.meta.classes
    name = f"evaluate {subject.data.meta.name}"
    recipe = json.loads((subject.bundle / "recipe.json").read_text())
    settings = {"evaluation": to_plain(config.evaluation), "registry": to_plain(config.registry)}
    params = recorded({**recipe, **settings}, place)
    parent = subject.training.get("run")
    with Run.start(config.tracking, name=name, kind="evaluate", params=params, parent=parent) as tracked:
        metrics = measure(subject.probabilities, subject.labels, classes, config.evaluation, config.seed)
        own = {k: v for k, v in subject.best.items() if "/" in k}
        outcome.write_tables(out, metrics, SPLIT, classes, own)
        outcome.write_answers(out / "answers.csv", subject.labels, subject.probabilities, classes)
        _draw(out, subject, metrics, config.evaluation)
        _write_report(out, subject, metrics, config.evaluation)
        meta = subject.data.meta
        digest = data_hash(place.prepared) if place.is_pipeline else meta.digest
        tracked.log_dataset(name=meta.name, digest=digest, source=str(place.prepared), split=SPLIT)
        tracked.log_metrics({**own, **metrics.flat(SPLIT)})
        for file in sorted(out.iterdir()):
            tracked.log_artifact(file, "evaluation")
        if place.is_pipeline:
            _register(tracked, config, subject, metrics, out, digest)
        delivery = tracked.finish()
    registration = {"run": tracked.key, "spool": config.tracking.spool, **_registration(delivery, config)}
    (out / "registration.json").write_text(json.dumps(registration, indent=2) + "\n")
    _tell(metrics, delivery, config, out)


def _answer(place: Place) -> Subject:
    from cnn_tuning.serving.predictor import Predictor

    bundle = place.input(place.baseline)
    data = PackedData.open(place.input(place.prepared))
    predictor = Predictor(bundle)
    if predictor.specification.data_name != data.meta.name:
        raise UserError(
            f"{bundle} was trained on {predictor.specification.data_name}, {data.path} is {data.meta.name}"
        )
    data.verify(SPLIT)
    test = data.split(SPLIT)
    facts = place.input(place.training / "training.json")
    return Subject(
        bundle=bundle,
        data=data,
        labels=test.labels,
        probabilities=predictor.probabilities(test.images),
        training=json.loads(facts.read_text()),
        best=json.loads((bundle / "best.json").read_text()),
    )


def _draw(out: Path, subject: Subject, metrics: Metrics, config: EvaluationConfig) -> None:
    classes = subject.data.meta.classes
    shown = outcome.confident_mistakes(subject.labels, subject.probabilities, config.mistakes_shown)
    predicted, confidence = subject.probabilities.argmax(1), subject.probabilities.max(1)
    captions = [(classes[subject.labels[i]], classes[predicted[i]], float(confidence[i])) for i in shown]
    wrong = int((predicted != subject.labels).sum())
    plots.learning_curves(subject.bundle / "history.csv", out / "learning_curves.png")
    plots.confusion_matrix(metrics.confusion, classes, out / "confusion.png")
    plots.calibration(out / "calibration.csv", config.confidence, out / "calibration.png")
    plots.mistakes(subject.data.split(SPLIT).images[shown], captions, wrong, out / "mistakes.png")


def _write_report(out: Path, subject: Subject, metrics: Metrics, config: EvaluationConfig) -> None:
    meta, training = subject.data.meta, subject.training
    bins, confidence = config.calibration_bins, metrics.confidence
    wilson, bootstrap = "Wilson score interval", "percentile bootstrap over images"
    figures = [
        {"name": name, "value": _show(e, form), "interval": _interval(e, form), "how": how}
        for name, e, form, how in (
            ("accuracy", metrics.accuracy, ".2%", wilson),
            ("macro F1", metrics.macro_f1, ".4f", bootstrap),
            ("log-loss", metrics.log_loss, ".4f", bootstrap),
            ("calibration error", metrics.calibration_error, ".4f", f"{bins} bins; {bootstrap}; biased upwards"),
        )
    ]
    classes = [
        {
            "name": name,
            "images": f"{metrics.confusion[i].sum():,}",
            "recall": _show(metrics.recall[name], ".2%"),
            "recall_interval": _interval(metrics.recall[name], ".2%"),
            "precision": _show(metrics.precision[name], ".2%"),
            "precision_interval": _interval(metrics.precision[name], ".2%"),
        }
        for i, name in enumerate(meta.classes)
    ]
    counts = ", ".join(f"{sum(n):,} {split}" for split, n in meta.counts.items())
    page.write_page(
        out / "report.html",
        title=f"{meta.name}: evaluation",
        headline=(
            f"{metrics.accuracy.value:.2%} of {metrics.count:,} test images are classified correctly "
            f"({100 * confidence:g} % interval {_interval(metrics.accuracy, '.2%')})."
        ),
        figures=figures,
        classes=classes,
        pictures=[
            ("Mistakes, the most confident first", out / "mistakes.png"),
            ("Confusion matrix", out / "confusion.png"),
            ("Learning curves", out / "learning_curves.png"),
            ("Calibration", out / "calibration.png"),
        ],
        facts={
            "data": f"{meta.name}, {counts}",
            "data digest": meta.digest,
            "weights (SHA-256)": json.loads((subject.bundle / "model.json").read_text())["weights_sha256"],
            "chosen epoch": f"{subject.best['epoch']} (step {subject.best['step']})",
            "training": f"{training['seconds']['train']} s at {training['samples_per_second']:,} samples/s",
            "device": f"{training['device']}, precision {training['precision']}, threads: {training['threads']}",
        },
    )


def _register(
    tracked: Run,
    config: EvaluateConfig,
    subject: Subject,
    metrics: Metrics,
    out: Path,
    digest: str,
) -> None:
    from cnn_tuning.tracking.store import quiet_mlflow

    quiet_mlflow()
    from cnn_tuning.serving.pyfunc import save

    meta = subject.data.meta
    model, predictions = Path(".state/registering/model"), out / "predictions.csv"
    shutil.rmtree(model.parent, ignore_errors=True)
    model.parent.mkdir(parents=True)
    save(subject.bundle, model, np.asarray(subject.data.split(SPLIT).images[0]))
    predicted, confidence = subject.probabilities.argmax(1), subject.probabilities.max(1)
    rows = zip(range(metrics.count), subject.labels.tolist(), predicted.tolist(), confidence, strict=True)
    write_predictions(predictions, meta.digests[SPLIT], rows)
    registry = config.registry
    tracked.register(
        model,
        name=registry.model,
        alias=registry.alias,
        predictions=predictions,
        gate=Gate(registry.significance, registry.minimum_gain),
        description=f"{meta.name}: test accuracy {metrics.accuracy.value:.2%} "
        f"{_interval(metrics.accuracy, '.2%')}",
        tags={"data": meta.name, "data_digest": digest, "train_run": str(subject.training.get("run"))},
    )
    shutil.rmtree(model.parent, ignore_errors=True)


def _registration(delivery: Delivery, config: EvaluateConfig) -> dict[str, Any]:
    return {
        "model": config.registry.model,
        "alias": config.registry.alias,
        "confidence": config.evaluation.confidence,
        "uri": delivery.uri,
        "state": delivery.state,
        "run_id": delivery.run_id,
        **(delivery.registered or {}),
    }


def _tell(metrics: Metrics, delivery: Delivery, config: EvaluateConfig, out: Path) -> None:
    accuracy = metrics.accuracy
    click.echo(f"test/accuracy {accuracy.value:.4f} {_interval(accuracy, '.4f')}; report: {out / 'report.html'}")
    if delivery.registered:
        version = delivery.registered["version"]
        click.echo(f"registered {config.registry.model} version {version}: {delivery.registered['reason']}")
    elif delivery.message:
        click.echo(delivery.message, err=True)


def _show(estimate: Estimate | None, form: str) -> str:
    return format(estimate.value, form) if estimate else "–"


def _interval(estimate: Estimate | None, form: str) -> str:
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]" if estimate else "–"


if __name__ == "__main__":
    stage(EvaluateConfig, run, "Measure the model on the test split, write the report, and register it.")
