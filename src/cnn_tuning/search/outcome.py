"""What a search found: a study comes in; tables, plots and a page in `results/search/` and plain values go out."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import Recipe, SearchConfig, changes_of, patch
from cnn_tuning.errors import UserError
from cnn_tuning.reports.search import caveat, headline, write_search_page
from cnn_tuning.reports.search_plots import draw
from cnn_tuning.reports.search_view import SearchView, Trial
from cnn_tuning.search.importance import importances

if TYPE_CHECKING:
    import optuna

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class SearchOutcome:
    """What was found. Without a complete trial `best_params` and the values are empty, `best_trial` is None.

    `best_params`: dotted name → label or number. Of several objectives the best in the first one is taken, and
    `front` has the trials that no other beats in all. `own_values`: of the experiment's own values. `caveat`: what
    must not be concluded from `sentence`.
    """

    best_trial: int | None
    best_params: dict[str, Any]
    best_values: dict[str, float]
    own_values: dict[str, float]
    front: tuple[int, ...]
    trials: dict[str, int]
    epochs: float
    seconds: float
    usd: float
    importances: dict[str, dict[str, float]]
    sentence: str
    caveat: str

    def flat(self) -> dict[str, float]:
        """Return the figures of the search by name."""
        figures = {f"best_{_plain(metric)}": value for metric, value in self.best_values.items()}
        figures |= {f"own_{_plain(metric)}": value for metric, value in self.own_values.items()}
        figures |= {"trials": sum(self.trials.values()), **{k: self.trials[k] for k in ("pruned", "failed")}}
        figures |= {"epochs": round(self.epochs, 2), "minutes": round(self.seconds / 60, 3)}
        return figures | ({"usd": round(self.usd, 6)} if self.usd else {})

    def metrics(self) -> dict[str, float]:
        """Return the figures as metrics of a run."""
        return {f"search/{name}": float(value) for name, value in self.flat().items()}

    def tags(self) -> dict[str, str]:
        """Return the best parameters and the importances as tags of a run."""
        tags = {f"best/{name}": str(value) for name, value in self.best_params.items()}
        if self.best_trial is not None:
            tags["best_trial"] = str(self.best_trial)
        several = len(self.importances) > 1
        for metric, weights in self.importances.items():
            for name, weight in weights.items():
                tags[f"importance/{metric}/{name}" if several else f"importance/{name}"] = f"{weight:.3f}"
        return tags


def write_outcome(
    folder: Path, study: optuna.Study, search: SearchConfig, recipe: Recipe, price_per_hour: float = 0.0
) -> SearchOutcome:
    """Write `trials.csv`, `best.json`, `importances.json`, `metrics.json`, the plots and `report.html`.

    Trials beyond the budget, of a larger one before, are left out everywhere. Those that were made without a price
    cost what they would now.
    """
    with _quiet():
        study = _within_budget(study, search.budget.trials)
        found, remarks = _importances(study, search)
    view = _view(study, search, recipe, found, price_per_hour / search.workers)
    outcome = _outcome(view)
    _write_trials(folder / "trials.csv", view)
    front = [{"trial": t.index, "values": t.values, "parameters": t.parameters} for t in view.front]
    best = {"trial": outcome.best_trial, "values": outcome.best_values, "parameters": outcome.best_params}
    _dump(folder / "best.json", best | ({"front": front} if len(view.directions) > 1 else {}))
    _dump(folder / "importances.json", {"method": search.importance, "shares": found, "remarks": remarks})
    _dump(folder / "metrics.json", {"search": outcome.flat()})
    pictures, left_out = draw(view, folder)
    write_search_page(folder / "report.html", view, search, pictures, [*_said(remarks, search), *left_out])
    return outcome


def _outcome(view: SearchView) -> SearchOutcome:
    counts = Counter(trial.state for trial in view.trials)
    return SearchOutcome(
        best_trial=view.best.index if view.best else None,
        best_params=dict(view.best.parameters) if view.best else {},
        best_values=dict(view.best.values) if view.best else {},
        own_values=dict(view.own.values) if view.own else {},
        front=tuple(trial.index for trial in view.front),
        trials={state: counts[state] for state in STATES.values()},
        epochs=sum(trial.epochs for trial in view.trials),
        seconds=sum(trial.seconds for trial in view.trials),
        usd=sum(trial.usd for trial in view.trials),
        importances={metric: dict(weights) for metric, weights in view.importances.items()},
        sentence=headline(view),
        caveat=caveat(view),
    )


def _within_budget(study: optuna.Study, count: int) -> optuna.Study:
    """Return a copy in memory of what is finished of the first `count` trials; `index` holds each number."""
    import optuna

    copy = optuna.create_study(directions=study.directions)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name in STATES and trial.number < count:
            copy.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={**trial.user_attrs, "index": trial.number},
                    intermediate_values=trial.intermediate_values,
                )
            )
    return copy


def _view(
    study: optuna.Study,
    search: SearchConfig,
    recipe: Recipe,
    found: Mapping[str, Mapping[str, float]],
    price: float,
) -> SearchView:
    directions: dict[str, str] = {objective.metric: objective.direction for objective in search.objectives}
    trials = sorted(
        (_trial(t, list(directions), search, price) for t in study.trials), key=lambda trial: trial.index
    )
    complete = [trial for trial in trials if trial.state == "complete"]
    front = [t for t in complete if not any(_beats(other, t, directions) for other in complete)]
    main, direction = next(iter(directions.items()))
    sign = -1 if direction == "maximize" else 1
    best = min(front, key=lambda t: (sign * t.values[main], t.index), default=None)
    own = next((t for t in complete if t.index == 0 and _is_own(t, search, recipe)), None)
    step = "seed" if search.pruner.name == "wilcoxon" else "epoch"
    return SearchView(search.name, directions, search.space, trials, best, front, own, found, step)


def _trial(trial: optuna.trial.FrozenTrial, metrics: list[str], search: SearchConfig, price: float) -> Trial:
    attrs, state = trial.user_attrs, STATES[trial.state.name]
    return Trial(
        index=attrs["index"],
        state=state,
        values=dict(zip(metrics, trial.values, strict=True)) if state == "complete" else {},
        parameters={name: trial.params[name] for name in search.space if name in trial.params},
        curve=sorted(trial.intermediate_values.items()),
        epochs=attrs.get("epochs", 0),
        updates=attrs.get("updates", 0),
        seconds=attrs.get("seconds", 0.0),
        usd=attrs.get("usd") or attrs.get("seconds", 0.0) / 3600 * price,
        reason=str(attrs.get("reason", "")),
        smaller_batch=attrs.get("smaller_batch", 0),
    )


def _beats(one: Trial, other: Trial, directions: Mapping[str, str]) -> bool:
    """Say whether one trial is no worse in all objectives and better in one."""
    gains = [
        (one.values[m] - other.values[m]) * (1 if direction == "maximize" else -1)
        for m, direction in directions.items()
    ]
    return min(gains) >= 0 and max(gains) > 0


def _is_own(trial: Trial, search: SearchConfig, recipe: Recipe) -> bool:
    """Say whether a trial trained the experiment's own values."""
    common = patch(recipe, search.settings)
    try:
        return patch(common, changes_of(search, trial.parameters)) == common
    except UserError:
        return False


def _importances(
    study: optuna.Study, search: SearchConfig
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    found: dict[str, dict[str, float]] = {}
    remarks: dict[str, list[str]] = {}
    for number, objective in enumerate(search.objectives):
        found[objective.metric], remarks[objective.metric] = importances(study, number, search.importance)
    return found, remarks


def _said(remarks: Mapping[str, list[str]], search: SearchConfig) -> list[str]:
    """Return the remarks on importances as sentences, with the objective where there are several."""
    several = len(search.objectives) > 1
    return [
        f"Importance{f' for {metric}' if several else ''}: {remark}."
        for metric, lines in remarks.items()
        for remark in lines
    ]


def _write_trials(path: Path, view: SearchView) -> None:
    told = ("epochs", "updates", "seconds", "usd", "usd_per_point", "smaller_batch", "reason")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", *view.directions, *view.space, *told])
        for trial in view.trials:
            values = [trial.values.get(metric, "") for metric in view.directions]
            parameters = [trial.parameters.get(name, "") for name in view.space]
            each = {**vars(trial), "usd_per_point": view.usd_per_point(trial)}
            writer.writerow([trial.index, trial.state, *values, *parameters, *(each[name] for name in told)])


def _dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(metric: str) -> str:
    return metric.replace("/", "_")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from telling of the study that is made here."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
