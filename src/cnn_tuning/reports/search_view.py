"""A search as plain values, for its plots and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnn_tuning.config import Dimension
from cnn_tuning.reports.scales import Scale, dimension_scale, metric_scale, short_names


@dataclass(frozen=True)
class Trial:
    """One trial. `values` by metric (none unless complete), `curve`: (epoch, value) as it was reported.

    `smaller_batch`: the batch size that it was trained with, where memory did not suffice for its own (else 0).
    """

    index: int
    state: str  # complete, pruned or failed
    values: Mapping[str, float]
    parameters: Mapping[str, Any]
    curve: Sequence[tuple[int, float]] = ()
    epochs: float = 0.0
    updates: int = 0
    seconds: float = 0.0
    usd: float = 0.0
    reason: str = ""
    smaller_batch: int = 0


@dataclass(frozen=True)
class SearchView:
    """A search as it is shown: `directions` by metric, `own` is the trial of the experiment's own values."""

    name: str
    directions: Mapping[str, str]
    space: Mapping[str, Dimension]
    trials: Sequence[Trial]
    best: Trial | None
    front: Sequence[Trial]
    own: Trial | None
    importances: Mapping[str, Mapping[str, float]]
    curve_step: str = "epoch"

    @property
    def complete(self) -> list[Trial]:
        """The trials that have values."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def main(self) -> str:
        """The first objective."""
        return next(iter(self.directions))

    @property
    def paid(self) -> bool:
        """Whether the trials had a price."""
        return any(trial.usd for trial in self.trials)

    def points_gained(self, trial: Trial) -> float | None:
        """Return the points of validation accuracy above the trial of the own values.

        None for that one itself, and where one of the two has no accuracy.
        """
        metric = "val/accuracy"
        if self.own is None or trial is self.own or metric not in trial.values or metric not in self.own.values:
            return None
        return 100 * (trial.values[metric] - self.own.values[metric])

    def usd_per_point(self, trial: Trial) -> float | None:
        """Return what a trial cost more than the one of the own values, for each point that it gained.

        Below zero where it cost less; None without a price or a gain.
        """
        points = self.points_gained(trial)
        if self.own is None or not self.paid or points is None or points <= 0:
            return None
        return (trial.usd - self.own.usd) / points

    def better(self, metric: str, values: Sequence[float]) -> float:
        """Return the best of some values."""
        return max(values) if self.directions[metric] == "maximize" else min(values)

    def varied(self) -> list[str]:
        """Return the dimensions that took more than one value in complete trials, the most important first."""
        weights = self.importances.get(self.main, {})
        taken = {n: {t.parameters[n] for t in self.complete if n in t.parameters} for n in self.space}
        return sorted((n for n in self.space if len(taken[n]) > 1), key=lambda n: -weights.get(n, 0.0))

    def scale(self, name: str) -> Scale:
        """Return the axis of a dimension."""
        values = [t.parameters[name] for t in self.trials if name in t.parameters]
        return dimension_scale(short_names(self.space)[name], self.space[name], values)

    def metric_scale(self, metric: str) -> Scale:
        """Return the axis of an objective over all complete trials."""
        return metric_scale(metric, [trial.values[metric] for trial in self.complete])
