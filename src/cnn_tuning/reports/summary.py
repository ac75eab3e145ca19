"""The table that `make repro` ends with, from the files of the last evaluation."""

from __future__ import annotations

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
    """Print result, time and places; raises `UserError` where there is no evaluation yet."""
    from rich.console import Console
    from rich.table import Table

    try:
        metrics = json.loads((results / "evaluation/metrics.json").read_text())["test"]
        registered = json.loads((results / "evaluation/registration.json").read_text())
        training = json.loads((results / "training/training.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: run `dvc repro` first") from None
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    confidence = f"{100 * registered['confidence']:g} %"
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    table.add_row(
        "test accuracy", f"[bold]{metrics['accuracy']:.2%}[/] ({confidence} interval {low:.2%} to {high:.2%})"
    )
    seconds = training["seconds"]
    speed = f"{training['samples_per_second']:,} samples/s on {training['device']}"
    table.add_row("training", f"{seconds['train']:.1f} s, {speed}")
    table.add_row("report", str(results / "evaluation/report.html"))
    table.add_row("model", _model(registered))
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


def _model(registered: dict[str, object]) -> str:
    delivered = Path(str(registered["spool"])) / f"{registered['run']}.delivery.json"
    if "version" not in registered and delivered.is_file():  # by a later `cnn-tuning sync`
        for progress in json.loads(delivered.read_text()).values():
            registered = {**registered, **(progress.get("registered") or {})}
    if "version" not in registered:
        return f"{registered['model']}: not registered yet (the store was away); deliver it with `cnn-tuning sync`"
    name = f"models:/{registered['model']}/{registered['version']}"
    return f"{name}, {registered['alias']}" if registered.get("promoted") else f"{name}; {registered['reason']}"
