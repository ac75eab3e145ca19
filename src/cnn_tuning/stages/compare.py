"""`cnn-tuning compare [RUN…]`: recorded runs in, one table out: host, accuracy, time, samples/s and dollars.

A row is a run of `train`, `ablate` or `tune`; what belongs to it (arms, trials, refits, evaluation) is in its
figures, so that no dollar is counted twice. Named runs may be of any kind.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import click

from cnn_tuning.config import TrackingConfig, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.reports.compared import Compared, print_compared, short_id
from cnn_tuning.tracking.facts import code_of
from cnn_tuning.tracking.reading import Recorded, read_runs

KINDS = ("train", "ablate", "tune")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Needed:
    """The section that this command reads."""

    tracking: TrackingConfig


def compare(
    names: Sequence[str],
    *,
    commit: str | None = None,
    every: bool = False,
    experiment: str | None = None,
    to_csv: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the table, or the rows as JSON; `to_csv` gets them, too."""
    tracking = compose_sections(Needed, ()).tracking
    rows = compared(tracking, names, commit=commit, every=every, experiment=experiment)
    if to_csv is not None:
        write_csv(to_csv, rows)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_compared(rows)
        if to_csv is not None:
            click.echo(f"{to_csv}: {len(rows)} rows")


def compared(
    tracking: TrackingConfig,
    names: Sequence[str] = (),
    *,
    commit: str | None = None,
    every: bool = False,
    experiment: str | None = None,
) -> list[Compared]:
    """Return rows of the runs named (by id, its beginning, or name), else of a commit (default: the present one).

    Raises:
        UserError: there are none; says what there is.
    """
    runs = read_runs(tracking, inner=bool(names))
    if not runs:
        raise UserError(f"no run is recorded in experiment {tracking.experiment} yet: run `dvc repro` first")
    family = _Family(runs)
    if names:
        chosen = _named(runs, names)
    else:
        chosen = [run for run in runs if run.kind in KINDS]
        wanted = None if every else _full(commit or "HEAD")
        if wanted:
            chosen = [run for run in chosen if wanted in family.commits(run)]
            if not chosen:
                raise UserError(
                    f"no run of commit {wanted[:12]}; {_known(runs)}: name one with --commit, or --all"
                )
    rows = [family.row(run) for run in chosen]
    if experiment is not None:
        there = Counter(row.experiment for row in rows)
        rows = [row for row in rows if row.experiment == experiment]
        if not rows:
            known = ", ".join(f"{name} ({count})" for name, count in there.most_common()) or "none"
            raise UserError(f"no such run of experiment {experiment}; there are runs of {known}")
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(rows, key=lambda row: (row.experiment, order.get(row.kind, len(KINDS)), row.started))


def write_csv(path: Path, rows: Sequence[Compared]) -> None:
    """Write the rows with all their fields; what is unknown stays empty."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Compared)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


class _Family:
    """Runs with those that belong to them."""

    def __init__(self, runs: Iterable[Recorded]) -> None:
        self.children: dict[str, list[Recorded]] = {}
        for run in runs:
            self.children.setdefault(run.parent, []).append(run)

    def of(self, run: Recorded, kind: str) -> list[Recorded]:
        """Return the finished runs of a kind that belong to a run, the latest first."""
        found = [child for child in self.children.get(run.key, ()) if child.kind == kind]
        return [child for child in reversed(found) if child.status == "FINISHED"]

    def model(self, run: Recorded) -> Recorded:
        """Return the training whose model a run left: of a search its first refit, which is the tuned model."""
        refits = self.of(run, "refit") if run.kind == "tune" else []
        return refits[-1] if refits else run

    def commits(self, run: Recorded) -> set[str]:
        """Return the commits that a run is of: of its training, and of the evaluations of its model."""
        involved = [run, *self.of(self.model(run), "evaluate")]
        names = ("git.commit", "git.snapshot_of")
        return {tag for other in involved for name in names if (tag := other.tags.get(name))}

    def row(self, run: Recorded) -> Compared:
        """Return a run's row."""
        model = self.model(run)
        split, accuracy, low, high = _accuracy(run, model, self.of(model, "evaluate"))
        data = next((value for name, value in run.tags.items() if name.startswith("data.")), "")
        price = float(run.tags.get("cnn_tuning.price_per_hour", 0))
        commit, dirty = code_of(run.tags)
        return Compared(
            run=run.id,
            name=run.name,
            kind=run.kind,
            status=run.status,
            experiment=run.params.get("experiment", data.partition(" ")[0]),
            data=data.rpartition(" ")[2],
            seed=run.params.get("seed", ""),
            commit=commit,
            dirty=dirty,
            host=host_of(run.tags),
            device=_device(model),
            split=split,
            accuracy=accuracy,
            accuracy_low=low,
            accuracy_high=high,
            seconds=run.metrics.get("time/seconds"),
            samples_per_second=model.metrics.get("time/samples_per_second"),
            price_per_hour=price,
            usd=run.metrics.get("cost/usd") if price else None,
            started=run.started,
        )


def _accuracy(
    run: Recorded, model: Recorded, evaluations: Sequence[Recorded]
) -> tuple[str | None, float | None, float | None, float | None]:
    """Return (split, value, low, high): of the test split where the model was evaluated, else of validation."""
    told = evaluations[0] if evaluations else run
    if "test/accuracy" in told.metrics:
        value, low, high = (told.metrics.get(f"test/accuracy{end}") for end in ("", "_low", "_high"))
        return "test", value, low, high
    measured = (
        model.metrics.get(name) for name in ("best/val_accuracy", "objective/val/accuracy", "val/accuracy")
    )
    value, images = next((x for x in measured if x is not None), None), model.metrics.get("val/images")
    if value is None or run.status != "FINISHED":
        return None, None, None, None
    if images is None:
        return "val", value, None, None
    from cnn_tuning.statistics import share_interval

    interval = share_interval(round(value * images), int(images), CONFIDENCE)
    return "val", value, interval.low, interval.high


def host_of(tags: Mapping[str, str]) -> str:
    """Return the type (and market) of a rented host, else processor and cores of the machine."""
    rented = tags.get("cnn_tuning.host") or tags.get("hardware.instance")
    if rented:
        return rented
    cpu = re.sub(r"\((?:R|TM|tm)\)|\bCPU\b|\bProcessor\b|@.*|\b\d+-Core\b", " ", tags.get("hardware.cpu", ""))
    cores = tags.get("hardware.cores", "")
    name = " ".join(cpu.split()) or "unknown"
    return f"{name}, {cores} core{'' if cores == '1' else 's'}" if cores else name


def _device(run: Recorded) -> str:
    device, gpu = run.tags.get("device", ""), run.tags.get("hardware.gpu", "none")
    return gpu if device.startswith("cuda") and gpu != "none" else device


def _named(runs: Sequence[Recorded], names: Sequence[str]) -> list[Recorded]:
    found: dict[str, Recorded] = {}
    for name in names:
        exact = [run for run in runs if name in (run.id, run.key, run.name)]
        short = [run for run in runs if run.id.startswith(name) or run.key.endswith(name)]
        matching = exact or (short if len(name) >= 4 else [])
        if not matching:
            latest = ", ".join(f"{short_id(run.id)} ({run.name})" for run in runs[-3:])
            raise UserError(f"no run {name}; the latest are {latest}")
        found |= {run.id: run for run in matching}
    return list(found.values())


def _known(runs: Sequence[Recorded]) -> str:
    counts: dict[str, int] = {}
    for run in reversed(runs):
        if run.kind in KINDS:
            commit, _ = code_of(run.tags)
            counts[commit] = counts.get(commit, 0) + 1
    latest = ", ".join(f"{commit[:12]} ({count})" for commit, count in list(counts.items())[:5])
    return f"there are runs of {latest}{', …' if len(counts) > 5 else ''}" if counts else "there are none at all"


def _full(commit: str) -> str:
    """Return the whole name of a commit; what Git does not know is taken as it is."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], capture_output=True, text=True
        )
    except OSError:
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    if commit == "HEAD":
        raise UserError("this is no Git repository with a commit: give --commit or --all")
    if done is not None and len(commit) < 40:
        raise UserError(f"Git knows no commit {commit} here")
    return commit
