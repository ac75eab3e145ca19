"""Train the arms of one question: a recipe for each arm and seed comes in, a `Result` for each goes out.

Each finished training is kept under a key of (recipe, data, code) in `folder`/KEY, so it is computed once,
whichever question asks for it, and an interrupted ablation goes on in mid-training. Several processes may
work on the same folder: a lock per key keeps them apart (`python -m cnn_tuning.ablation.worker`).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cnn_tuning.ablation.outcome import Result
from cnn_tuning.config import (
    DiagnosisConfig,
    QuestionConfig,
    Recipe,
    TrackingConfig,
    arms,
    flatten,
    patch,
    side_by_side,
    to_plain,
)
from cnn_tuning.data.packed import PackedData
from cnn_tuning.diagnosis.findings import rules_fired
from cnn_tuning.diagnosis.judge import judge
from cnn_tuning.diagnosis.recording import Recording, read_recording, write_recording, write_sheet
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.errors import UserError
from cnn_tuning.reports.training import judge_and_record
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.fit import Diverged, Fitted, OutOfMemory, fit
from cnn_tuning.training.resume import State

RESULT = "result.json"
RIGHT = "right.npy"
RECORDING = "recording"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Job:
    """One training: an arm of a question with a seed."""

    question: str
    arm: str
    recipe: Recipe
    place: str  # such as 3/12

    @property
    def name(self) -> str:
        """Return what a person sees."""
        return f"{self.question} {self.place}: {self.arm}, seed {self.recipe.seed}"


def jobs_of(name: str, question: QuestionConfig, recipe: Recipe, workers: int) -> list[Job]:
    """Return the trainings of a question, seed by seed, so that an early end leaves whole pairs.

    Several workers share the cores; the number of threads of each becomes part of its recipe.
    """
    return jobs_for(name, arms(side_by_side(recipe, workers), question), recipe.seed, question.seeds)


def jobs_for(name: str, recipes: Mapping[str, Recipe], first_seed: int, seeds: int) -> list[Job]:
    """Return the trainings of recipes by their arms' labels, seed by seed."""
    pairs = [(seed, label) for seed in range(first_seed, first_seed + seeds) for label in recipes]
    return [
        Job(name, label, patch(recipes[label], {"seed": seed}), f"{i}/{len(pairs)}")
        for i, (seed, label) in enumerate(pairs, start=1)
    ]


def train_jobs(
    jobs: Sequence[Job],
    data: PackedData,
    folder: Path,
    *,
    diagnosis: DiagnosisConfig,
    tracking: TrackingConfig,
    parent: str,
) -> None:
    """Train each job that no process has trained or is training; `parent` is the key of the ablation's run.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    for job, kept in _missing(jobs, data, folder):
        kept.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(kept / "lock", timeout=0):
                if not (kept / RESULT).exists():
                    _train(job, data, kept, diagnosis, tracking, parent)
        except Timeout:
            continue  # another process is at it


def results_of(
    jobs: Sequence[Job], data: PackedData, folder: Path, price_per_hour: float, diagnosis: DiagnosisConfig
) -> list[Result]:
    """Return the results of jobs that are all trained, with what the rules find in them as they are set now."""
    return [_read(job, _kept(job, data, folder), price_per_hour, diagnosis) for job in jobs]


def missing(jobs: Sequence[Job], data: PackedData, folder: Path) -> int:
    """Return how many jobs are still to be trained."""
    return sum(1 for _ in _missing(jobs, data, folder))


def begun(jobs: Sequence[Job], data: PackedData, folder: Path) -> int:
    """Return how many jobs are trained, or are partly."""
    places = (_kept(job, data, folder) for job in jobs)
    return sum((kept / RESULT).exists() or any(kept.glob(f"{UNFINISHED}/*/checkpoints.json")) for kept in places)


def _missing(jobs: Sequence[Job], data: PackedData, folder: Path) -> Iterator[tuple[Job, Path]]:
    for job in jobs:
        kept = _kept(job, data, folder)
        if not (kept / RESULT).exists():
            yield job, kept


def _kept(job: Job, data: PackedData, folder: Path) -> Path:
    return State(folder, job.recipe, data.meta.digest).path


def _train(
    job: Job, data: PackedData, kept: Path, diagnosis: DiagnosisConfig, tracking: TrackingConfig, parent: str
) -> None:
    tags = {"ablation": job.question, "arm": job.arm, "seed": str(job.recipe.seed)}
    name = f"{job.question}: {job.arm}, seed {job.recipe.seed}"
    params = flatten(to_plain(job.recipe))
    began, watch = time.monotonic(), Watch(job.recipe, diagnosis, job.name, stops=False)
    facts: dict[str, Any] = {"findings": []}
    right = None
    goes_on = (kept / UNFINISHED).exists()
    try:
        with Run.start(
            tracking, name=name, kind="arm", params=params, tags=tags, parent=parent, waits=False, goes_on=goes_on
        ) as tracked:
            try:
                fitted = fit(
                    job.recipe,
                    data,
                    state_folder=kept / UNFINISHED,
                    log=tracked.log_metrics,
                    callbacks=watch.callbacks,
                    name=job.name,
                    brief=True,
                )
            except Diverged:
                recording = watch.broken_off(tracked.system_samples())
                found = judge_and_record(tracked, kept / UNFINISHED, job.recipe, recording, diagnosis, job.name)
                facts["findings"] = rules_fired(found)
                _keep(recording, kept / RECORDING)
                raise
            recording = watch.conclude(fitted, data, tracked.system_samples())
            found = judge_and_record(tracked, kept / UNFINISHED, fitted.recipe, recording, diagnosis, job.name)
            facts["findings"] = rules_fired(found)
            _keep(recording, kept / RECORDING)
            facts |= {**_facts(fitted, job.recipe), "run": tracked.key}
            right = right_answers(recording)
            tracked.log_metrics({"val/gap": facts["gap"]})
            tracked.log_metrics({"best/val_accuracy": right.mean(), "val/images": len(right)})
            tracked.log_metrics({"time/samples_per_second": fitted.samples_per_second})
            tracked.set_tags({"device": fitted.device})
            outcome = f"val/accuracy {right.mean():.2%}, {fitted.seconds['fit']:.0f} s"
    except (Diverged, OutOfMemory) as error:
        # A finding about this arm, not the end of the ablation.
        outcome = str(error)
        facts |= {"failure": outcome, "seconds": time.monotonic() - began}
    _write(kept, {**facts, "recipe": params}, right)
    shutil.rmtree(kept / UNFINISHED, ignore_errors=True)
    print(f"{job.name}: {outcome}", file=sys.stderr)


def _facts(fitted: Fitted, asked: Recipe) -> dict[str, Any]:
    last, batch_size = fitted.history[-1], fitted.recipe.trainer.batch_size
    return {
        "train_accuracy": fitted.best["train/accuracy"],
        "last_val_accuracy": last["val/accuracy"],
        "gap": last["train/accuracy"] - last["val/accuracy"],
        "val_loss": fitted.best["val/loss"],
        "epochs": len(fitted.history),
        "updates": last["step"],
        "seconds": fitted.seconds["setup"] + fitted.seconds["fit"],
        "device": fitted.device,
        "precision": fitted.precision,
        "threads": fitted.threads,
        "smaller_batch": batch_size if batch_size != asked.trainer.batch_size else 0,
    }


def right_answers(recording: Recording) -> NDArray[np.bool_]:
    """Return for each validation image whether the best network answers it rightly."""
    assert recording.data is not None
    return recording.data.probabilities.argmax(1) == recording.data.labels


def _write(kept: Path, facts: Mapping[str, Any], right: NDArray[np.bool_] | None) -> None:
    if right is not None:
        np.save(kept / RIGHT, right)
    partial = kept / f"{RESULT}.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(kept / RESULT)


def _keep(recording: Recording, folder: Path) -> None:
    write_recording(recording, folder)
    write_sheet(recording, folder)


def _recorded(kept: Path) -> Recording | None:
    """Return the recording; None where none is kept, or one of another version."""
    try:
        return read_recording(kept / RECORDING, kept / RECORDING)
    except UserError:
        return None


def _loss_gap(recording: Recording | None) -> float:
    if recording is None or not len(recording.curves.val_loss):
        return float("nan")
    return float(recording.curves.val_loss[-1]) - float(recording.curves.train_loss[-1])


def _read(job: Job, kept: Path, price_per_hour: float, diagnosis: DiagnosisConfig) -> Result:
    facts = json.loads((kept / RESULT).read_text())
    right = None if facts.get("failure") else np.load(kept / RIGHT)
    recording = _recorded(kept)
    findings = rules_fired(judge(recording, diagnosis)) if recording else facts.get("findings", ())
    return Result(
        arm=job.arm,
        seed=job.recipe.seed,
        right=right,
        train_accuracy=facts.get("train_accuracy", float("nan")),
        val_accuracy=float("nan") if right is None else float(right.mean()),
        val_loss=facts.get("val_loss", float("nan")),
        seconds=facts["seconds"],
        usd=facts["seconds"] / 3600 * price_per_hour,
        epochs=facts.get("epochs", 0),
        updates=facts.get("updates", 0),
        failure=facts.get("failure", ""),
        findings=tuple(findings),
        gap=facts.get("gap", float("nan")),
        made_on=" ".join(str(facts[name]) for name in ("device", "precision") if name in facts),
        last_val_accuracy=facts.get("last_val_accuracy", float("nan")),
        smaller_batch=facts.get("smaller_batch", 0),
        loss_gap=_loss_gap(recording),
    )
