"""Fit one recipe and write what came of it: used by `train`, and by `tune` for the refit of its best.

A model's folder holds only what the recipe, the data and the code decide, so that the same inputs give the
same bytes; times and rates are returned.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from cnn_tuning.config import Recipe, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.models import bundle
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.fit import Fitted, fit


def fit_to_folder(
    recipe: Recipe, data: PackedData, out: Path, *, state: Path, tracked: Run, name: str
) -> tuple[Fitted, dict[str, Any]]:
    """Fit, write the best network with its history to the existing folder `out`, record it all.

    Returns:
        What the fit gave, and the facts about it that differ from one run to the next.

    Raises:
        Interrupted: a signal came; the state is saved below `state`.
    """
    fitted = fit(recipe, data, state_folder=state, log=tracked.log_metrics, name=name)
    bundle.save(out, fitted.network, fitted.specification)
    _write_history(out / "history.csv", fitted.history)
    (out / "recipe.json").write_text(json.dumps(to_plain(fitted.recipe), indent=2) + "\n")
    (out / "best.json").write_text(json.dumps(fitted.best, indent=2) + "\n")
    (out / "layers.txt").write_text(fitted.layers + "\n")
    facts = {
        "run": tracked.key,
        "seconds": {name: round(value, 2) for name, value in fitted.seconds.items()},
        "samples_per_second": round(fitted.samples_per_second),
        "device": fitted.device,
        "precision": fitted.precision,
        "threads": fitted.threads,
        "batch_size": fitted.recipe.trainer.batch_size,
        "resumed_from_step": fitted.resumed_from,
    }
    tracked.set_tags({k: str(v) for k, v in facts.items() if k not in ("run", "seconds", "samples_per_second")})
    seconds = {f"time/{k}_seconds": v for k, v in fitted.seconds.items()}
    tracked.log_metrics({**seconds, "time/samples_per_second": fitted.samples_per_second})
    for file in sorted(out.iterdir()):
        tracked.log_artifact(file, "model")
    return fitted, facts


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
