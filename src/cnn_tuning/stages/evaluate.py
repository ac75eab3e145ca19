"""Measure the models on the test split, compare, report and register: `python -m cnn_tuning.stages.evaluate`.

The only stage that opens the test split. The baseline and, where there was a search, the tuned model answer the
same images; each is registered as a version and put through the gate. By hand nothing is registered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cnn_tuning.config import EvaluationConfig
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.evaluation import chapters, outcome
from cnn_tuning.evaluation.chapters import Folders
from cnn_tuning.evaluation.comparison import Comparison, compare
from cnn_tuning.evaluation.leak import Leak, find_leak
from cnn_tuning.evaluation.metrics import Metrics, measure
from cnn_tuning.evaluation.mistakes import Mistake, find_mistakes
from cnn_tuning.evaluation.report import Origin, Section, interval, write_report
from cnn_tuning.reports import plots
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.stages.lineage import prepared_data
from cnn_tuning.stages.registering import SPLIT, EvaluateConfig, Subject, figures, record, registration
from cnn_tuning.tracking.run import Delivery, attach


def run(config: EvaluateConfig, place: Place) -> None:
    """Answer every test image once with each model, measure, compare, draw, log and register."""
    out = place.outputs / place.evaluation
    empty_folder(out)
    data = prepared_data(place)
    data.verify(SPLIT)
    subjects = [_answer(data, "baseline", place.top / place.baseline, place.top / place.training)]
    tuned = place.beside_baseline(place.tuned)
    if (tuned / "model.json").exists():
        subjects.append(_answer(data, "tuned", tuned, place.beside_baseline(place.refit)))
    labels, confidence = data.split(SPLIT).labels, config.evaluation.confidence
    measured = {
        s.name: measure(s.probabilities, labels, data.meta.classes, config.evaluation, config.seed)
        for s in subjects
    }
    comparison = compare(subjects[1].answers, subjects[0].answers, labels, confidence) if subjects[1:] else None
    mistakes = {s.name: _draw(out / s.name, s, data, measured[s.name], config.evaluation) for s in subjects}
    leak = find_leak(data, {s.name: s.answers for s in subjects})
    _write_metrics(out / "metrics.json", subjects, measured, comparison, leak)
    deliveries = {
        s.name: record(config, place, data, s, measured[s.name], comparison if s.name == "tuned" else None, out)
        for s in subjects
    }
    registrations = {name: registration(delivery, config) for name, delivery in deliveries.items()}
    (out / "registration.json").write_text(json.dumps(registrations, indent=2) + "\n")
    sections = [
        _section(out / s.name, s, measured[s.name], mistakes[s.name], registrations[s.name]) for s in subjects
    ]
    _write_report(out / "report.html", data, sections, comparison, leak, place, config)
    # After the runs' end: the page tells what the gate said of each.
    attach(config.tracking, [*deliveries.values()], out / "report.html", "evaluation")
    worth = _worth(out, place, subjects[0], comparison, config)
    _tell(out, measured, comparison, leak, deliveries, config, worth)
    for delivery in deliveries.values():
        if delivery.registered and "refused" in delivery.registered:
            raise UserError(f"{config.registry.model}: {delivery.registered['reason']}")


def _answer(data: PackedData, name: str, bundle: Path, facts: Path) -> Subject:
    from cnn_tuning.serving.predictor import Predictor, fastest_device

    began = time.monotonic()
    predictor = Predictor(bundle, device=fastest_device())
    if predictor.specification.data_name != data.meta.name:
        raise UserError(
            f"{bundle} was trained on {predictor.specification.data_name}, {data.path} is {data.meta.name}"
        )
    probabilities = predictor.probabilities(data.split(SPLIT).images)
    return Subject(
        name=name,
        bundle=bundle,
        probabilities=probabilities,
        training=json.loads((facts / "training.json").read_text()),
        best={
            k: v
            for k, v in json.loads((bundle / "best.json").read_text()).items()
            if "/" in k or k in ("epoch", "step")
        },
        seconds=time.monotonic() - began,
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
    path: Path,
    subjects: Sequence[Subject],
    measured: Mapping[str, Metrics],
    comparison: Comparison | None,
    leak: Leak,
) -> None:
    tree: dict[str, Any] = {s.name: outcome.tree_of(figures(s, measured[s.name])) for s in subjects}
    if comparison is not None:
        tree["comparison"] = comparison.flat()
    without = {f"{name}_accuracy_without": accuracy for name, accuracy in leak.without.items()}
    tree["leak"] = {"not_evaluated": leak.unknown} if leak.unknown else {"images": leak.images, **without}
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _section(
    folder: Path,
    subject: Subject,
    metrics: Metrics,
    mistakes: Sequence[Mistake],
    registration: Mapping[str, Any],
) -> Section:
    if "version" in registration:
        gate = f"{registration['model']} version {registration['version']}, {registration['reason']}"
    elif "reason" in registration:  # the user may not make one, or the store refused it
        gate = f"{registration['model']}: {registration['reason']}"
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
    leak: Leak,
    place: Place,
    config: EvaluateConfig,
) -> None:
    from cnn_tuning.tracking.facts import code_text, gather

    tags = gather()
    facts = {
        "commit": code_text(tags),
        "evaluated on": f"{tags['hardware.cpu']}, {tags['hardware.cores']} cores, GPU: {tags['hardware.gpu']}",
        "packages": ", ".join(f"{k[8:]} {v}" for k, v in tags.items() if k.startswith("package.")),
        "test images seen in training": leak.sentence,
    }
    write_report(
        path,
        Origin(data.meta, data.path, _folders(place), facts),
        sections,
        comparison,
        bins=config.evaluation.calibration_bins,
        price_per_hour=config.tracking.price_per_hour,
    )


def _folders(place: Place) -> Folders:
    top = place.top
    return Folders(
        data=top / "results/data",
        training=top / place.training,
        ablation=top / place.ablation,
        search=place.beside_baseline(place.search),
        diagnosis=top / place.diagnosis,
    )


def _worth(
    out: Path, place: Place, baseline: Subject, comparison: Comparison | None, config: EvaluateConfig
) -> str:
    """Write `cost.json` where a price is set, and return what tuning cost for each point that it gained."""
    spent = chapters.spent(_folders(place), baseline.training, config.tracking.price_per_hour)
    if not comparison or not spent["priced"]:
        return ""
    sentence, figures = chapters.worth(spent["tuning_usd"], comparison.gain)
    if figures:
        (out / "cost.json").write_text(json.dumps(figures, indent=2) + "\n")
    return sentence


def _tell(
    out: Path,
    measured: Mapping[str, Metrics],
    comparison: Comparison | None,
    leak: Leak,
    deliveries: Mapping[str, Delivery],
    config: EvaluateConfig,
    worth: str,
) -> None:
    for name, metrics in measured.items():
        accuracy, delivery = metrics.accuracy, deliveries[name]
        click.echo(f"{name}: test/accuracy {accuracy.value:.4f} {interval(accuracy, '.4f')}")
        if delivery.registered and "refused" not in delivery.registered:
            version = delivery.registered.get("version")
            made = f"registered {config.registry.model} version {version}" if version else config.registry.model
            click.echo(f"{made}: {delivery.registered['reason']}")
    if comparison is not None:
        click.echo(comparison.sentence("tuned", "baseline"))
    if worth:
        click.echo(worth)
    if leak.images or leak.unknown:
        click.echo(f"test images seen in training: {leak.sentence}")
    click.echo(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    stage(EvaluateConfig, run, "Measure the models on the test split, write the report, and register them.")
