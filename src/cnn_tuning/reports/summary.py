"""The table that `make repro` ends with, from the files of the last evaluation."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from cnn_tuning.errors import UserError

NEXT = (
    ("mlflow ui", "compare runs at http://127.0.0.1:5000 (make ui)"),
    ("cnn-tuning serve", "answer at http://127.0.0.1:8080 (make serve)"),
    ("dvc exp run -S seed=1", "the same experiment with another seed"),
)


def print_summary(results: Path) -> None:
    """Print results, time and places; raises `UserError` where there is no evaluation yet."""
    from rich.console import Console
    from rich.table import Table

    try:
        metrics = json.loads((results / "evaluation/metrics.json").read_text())
        registered = json.loads((results / "evaluation/registration.json").read_text())
        training = json.loads((results / "training/training.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: run `dvc repro` first") from None
    if "baseline" not in registered:
        raise UserError(f"{results}/evaluation is of an earlier version: run `dvc repro`")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, registration in registered.items():
        test, level = metrics[name]["test"], f"{100 * registration['confidence']:g} % interval"
        low, high = test["accuracy_low"], test["accuracy_high"]
        figures = f"test accuracy [bold]{test['accuracy']:.2%}[/] ({level} {low:.2%} to {high:.2%})"
        table.add_row(name, f"{figures}; {_model(registration)}")
    if "comparison" in metrics:
        table.add_row("tuned or baseline", _verdict(metrics["comparison"]))
    seconds = training["seconds"]
    speed = f"{training['samples_per_second']:,} samples/s on {training['device']}"
    table.add_row("training", f"{seconds['train']:.1f} s, {speed}")
    for comparisons in sorted(results.glob("ablation/*/comparisons.csv")):
        for row in csv.DictReader(comparisons.read_text().splitlines()):
            table.add_row(f"ablation {comparisons.parent.name}", _compared(row))
    reports = [
        path for name in ("evaluation", "search", "ablation") if (path := results / name / "report.html").exists()
    ]
    table.add_row("reports", ", ".join(map(str, reports)))
    commands = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if "VIRTUAL_ENV" not in os.environ:
        commands.add_row("[bold]source .venv/bin/activate[/]", "once in this terminal, then:")
    for command, about in NEXT:
        commands.add_row(f"[bold]{command}[/]", about)
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print("\nNext:")
    console.print(commands)


def _compared(row: dict[str, str]) -> str:
    if not row["accuracy_low"]:
        return f"{row['arm']} against {row['reference']}: see the report"
    value, low, high = (100 * float(row[f"accuracy_{name}"]) for name in ("difference", "low", "high"))
    found = "" if low > 0 or high < 0 else ", within chance"
    return f"{row['arm']} against {row['reference']}: {value:+.2f} points [{low:.2f}, {high:.2f}]{found}"


def _verdict(comparison: dict[str, float]) -> str:
    gain, low, high = (100 * comparison[name] for name in ("gain", "gain_low", "gain_high"))
    return f"{gain:+.2f} points [{low:.2f}, {high:.2f}], McNemar p = {comparison['mcnemar_p']:.2g}"


def _model(registered: dict[str, object]) -> str:
    delivered = Path(str(registered["spool"])) / f"{registered['run']}.delivery.json"
    if "version" not in registered and delivered.is_file():  # by a later `cnn-tuning sync`
        for progress in json.loads(delivered.read_text()).values():
            registered = {**registered, **(progress.get("registered") or {})}
    if "version" not in registered and "reason" in registered:
        return f"{registered['model']}: {registered['reason']}"
    if "version" not in registered:
        return f"{registered['model']}: not registered yet (the store was away); deliver it with `cnn-tuning sync`"
    name = f"models:/{registered['model']}/{registered['version']}"
    return f"{name}, {registered['alias'] if registered.get('promoted') else 'not promoted'}"
