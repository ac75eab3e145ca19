"""Measure the models on the test split, compare, report and register: `python -m cnn_tuning.stages.evaluate`.

The only stage that opens the test split. The baseline and, where there was a search, the tuned model answer the
same images; each is registered as a version and put through the gate. By hand nothing is registered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from cnn_tuning.config import EvaluationConfig, RegistryConfig, TrackingConfig, flatten, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.evaluation import outcome
from cnn_tuning.evaluation.chapters import Folders
from cnn_tuning.evaluation.comparison import Comparison, compare
from cnn_tuning.evaluation.metrics import Metrics, measure
from cnn_tuning.evaluation.mistakes import Mistake, find_mistakes
from cnn_tuning.evaluation.report import Origin, Section, interval, write_report
from cnn_tuning.reports import plots
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.stages.lineage import data_hash, prepared_data, recorded
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
    """One model that is evaluated: its folder, its answers, and the facts of its training."""

    name: str
    bundle: Path
    probabilities: NDArray[np.float32]
    training: Mapping[str, Any]
    best: Mapping[str, float]

    @property
    def answers(self) -> NDArray[np.int64]:
        """Return the index of the most probable class of each image."""
        return self.probabilities.argmax(1)


def run(config: EvaluateConfig, place: Place) -> None:
    """Answer every test image once with each model, measure, compare, draw, log and register."""
    out = place.outputs / place.evaluation
    empty_folder(out)
    data = prepared_data(place)
    data.verify(SPLIT)
    subjects = [_answer(place, data, "baseline", place.baseline, place.training)]
    if (place.input(place.tuned) / "model.json").exists():
        subjects.append(_answer(place, data, "tuned", place.tuned, place.refit))
    labels, confidence = data.split(SPLIT).labels, config.evaluation.confidence
    measured = {
        s.name: measure(s.probabilities, labels, data.meta.classes, config.evaluation, config.seed)
        for s in subjects
    }
    comparison = compare(subjects[1].answers, subjects[0].answers, labels, confidence) if subjects[1:] else None
    mistakes = {s.name: _draw(out / s.name, s, data, measured[s.name], config.evaluation) for s in subjects}
    _write_metrics(out / "metrics.json", subjects, measured, comparison)
    deliveries = {
        s.name: _record(config, place, data, s, measured[s.name], comparison if s.name == "tuned" else None, out)
        for s in subjects
    }
    registrations = {name: _registration(delivery, config) for name, delivery in deliveries.items()}
    (out / "registration.json").write_text(json.dumps(registrations, indent=2) + "\n")
    sections = [
        _section(out / s.name, s, measured[s.name], mistakes[s.name], registrations[s.name]) for s in subjects
    ]
    _write_report(out / "report.html", data, sections, comparison, place, config)
    _tell(out, measured, comparison, deliveries, config)


def _answer(place: Place, data: PackedData, name: str, model: Path, facts: Path) -> Subject:
    from cnn_tuning.serving.predictor import Predictor

    bundle = place.input(model)
    predictor = Predictor(bundle)
    if predictor.specification.data_name != data.meta.name:
        raise UserError(
            f"{bundle} was trained on {predictor.specification.data_name}, {data.path} is {data.meta.name}"
        )
    return Subject(
        name=name,
        bundle=bundle,
        probabilities=predictor.probabilities(data.split(SPLIT).images),
        training=json.loads(place.input(facts / "training.json").read_text()),
        best={
            k: v
            for k, v in json.loads((bundle / "best.json").read_text()).items()
            if "/" in k or k in ("epoch", "step")
        },
    )


def _draw(
    out: Path, subject: Subject, data: PackedData, metrics: Metrics, config: EvaluationConfig
) -> list[Mistake]:
    """Write one model's tables and plots, and return its most confident mistakes."""
    out.mkdir()
    classes, split = data.meta.classes, data.split(SPLIT)
    outcome.write_tables(out, metrics, classes)
    outcome.write_answers(out / "answers.csv", split.labels, subject.probabilities, classes)
    mistakes = find_mistakes(subject.bundle, split, subject.probabilities, classes, config.mistakes_shown)
    wrong = int((subject.answers != split.labels).sum())
    plots.learning_curves(subject.bundle / "history.csv", out / "learning_curves.png")
    plots.confusion_matrix(metrics.confusion, classes, out / "confusion.png")
    plots.calibration(out / "calibration.csv", config.confidence, out / "calibration.png")
    plots.mistakes([m.pictures for m in mistakes], [m.caption for m in mistakes], wrong, out / "mistakes.png")
    return mistakes


def _write_metrics(
    path: Path, subjects: Sequence[Subject], measured: Mapping[str, Metrics], comparison: Comparison | None
) -> None:
    tree: dict[str, Any] = {s.name: outcome.tree_of(_figures(s, measured[s.name])) for s in subjects}
    if comparison is not None:
        tree["comparison"] = comparison.flat()
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _figures(subject: Subject, metrics: Metrics) -> dict[str, float]:
    own = {name: value for name, value in subject.best.items() if "/" in name}
    return {**own, **metrics.flat(SPLIT)}


def _record(
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
        config.tracking, name=name, kind="evaluate", params=params, tags=tags, parent=parent
    ) as tracked:
        digest = data_hash(place.prepared) if place.is_pipeline else data.meta.digest
        tracked.log_dataset(name=data.meta.name, digest=digest, source=str(place.prepared), split=SPLIT)
        tracked.log_metrics(_figures(subject, metrics))
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
    against = f"; {comparison.sentence('the tuned model', 'the baseline')}" if comparison is not None else ""
    tracked.register(
        model,
        name=registry.model,
        alias=registry.alias,
        predictions=predictions,
        gate=Gate(registry.significance, registry.minimum_gain, registry.barred),
        description=f"{registry.barred + ': ' if registry.barred else ''}{meta.name}, {subject.name}: test accuracy {metrics.accuracy.value:.2%} "
        f"{interval(metrics.accuracy, '.2%')}{against}",
        tags={
            "data": meta.name,
            "data_digest": digest,
            "train_run": str(subject.training.get("run")),
            "model": subject.name,
            **({"barred": registry.barred} if registry.barred else {}),
        },
    )
    shutil.rmtree(model.parent, ignore_errors=True)


def _registration(delivery: Delivery, config: EvaluateConfig) -> dict[str, Any]:
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


def _section(
    folder: Path,
    subject: Subject,
    metrics: Metrics,
    mistakes: Sequence[Mistake],
    registration: Mapping[str, Any],
) -> Section:
    if "version" in registration:
        gate = f"{registration['model']} version {registration['version']}, {registration['reason']}"
    elif registration["state"] == "delivered":
        gate = "not registered, as this evaluation was made by hand"
    else:
        gate = "not registered yet, as the store was away: `cnn-tuning sync` delivers the model"
    return Section(
        name=subject.name,
        metrics=metrics,
        folder=folder,
        weights=json.loads((subject.bundle / "model.json").read_text())["weights_sha256"],
        best=subject.best,
        training=subject.training,
        recipe=json.loads((subject.bundle / "recipe.json").read_text()),
        mistakes=mistakes,
        gate=gate,
        run=str(registration["run"]),
    )


def _write_report(
    path: Path,
    data: PackedData,
    sections: Sequence[Section],
    comparison: Comparison | None,
    place: Place,
    config: EvaluateConfig,
) -> None:
    from cnn_tuning.tracking.facts import gather

    # Beside the model that is evaluated: by hand, the pipeline's results may be another experiment's.
    top = place.inputs if (place.inputs / place.baseline).exists() else Path()
    folders = Folders(
        data=top / "results/data",
        training=top / place.training,
        ablation=top / place.ablation,
        search=top / place.search,
        diagnosis=top / place.diagnosis,
    )
    tags = gather()
    changed = f", with changes in {tags['git.dirty_files']}" if "git.dirty_files" in tags else ""
    facts = {
        "commit": tags["git.commit"] + changed,
        "evaluated on": f"{tags['hardware.cpu']}, {tags['hardware.cores']} cores, GPU: {tags['hardware.gpu']}",
        "packages": ", ".join(f"{k[8:]} {v}" for k, v in tags.items() if k.startswith("package.")),
    }
    write_report(
        path,
        Origin(data.meta, data.path, folders, facts),
        sections,
        comparison,
        bins=config.evaluation.calibration_bins,
        price_per_hour=config.tracking.price_per_hour,
    )


def _tell(
    out: Path,
    measured: Mapping[str, Metrics],
    comparison: Comparison | None,
    deliveries: Mapping[str, Delivery],
    config: EvaluateConfig,
) -> None:
    for name, metrics in measured.items():
        accuracy, delivery = metrics.accuracy, deliveries[name]
        click.echo(f"{name}: test/accuracy {accuracy.value:.4f} {interval(accuracy, '.4f')}")
        if delivery.registered:
            version = delivery.registered["version"]
            click.echo(f"registered {config.registry.model} version {version}: {delivery.registered['reason']}")
    if comparison is not None:
        click.echo(comparison.sentence("tuned", "baseline"))
    click.echo(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    stage(EvaluateConfig, run, "Measure the models on the test split, write the report, and register them.")
