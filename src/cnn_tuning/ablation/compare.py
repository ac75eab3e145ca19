"""Arms against each other: a `Result` for each arm and seed comes in, `Comparison`s with intervals go out.

Two questions are kept apart. Would other seeds show the same on these images? That is the t interval of the
paired differences over seeds. Would other images show it for these networks? That is McNemar's test.

The intervals of a question, over accuracy and generalisation gap of all its comparisons, hold together with the
stated confidence (Bonferroni). A step-down correction such as Holm's rejects a little more, but has no intervals
that agree with its decisions; here the interval is the decision. McNemar's p values have no interval to agree
with and are corrected by Holm's method, a family of their own. So are the intervals of the gap in loss: where
networks answer nearly every training image rightly, their accuracies hardly tell them apart, and their losses do.

Each pair of arms is judged by the spread of its own differences. One spread for all arms would find more with few
seeds, but arms differ in spread: simulated with one arm four times as unstable, every tenth study without any
effect would then claim one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.statistics import (
    Estimate,
    each_of,
    holm,
    mcnemar,
    mean_interval,
    mean_p,
    ratio_interval,
    seeds_to_settle,
)


@dataclass(frozen=True)
class Result:
    """One training of an arm with a seed; `right`: whether each validation image was answered rightly.

    All figures are of the best epoch, but `last_val_accuracy` and two of the last: `gap`, training less validation
    accuracy, and `loss_gap`, validation less training loss (nats). The best epoch was chosen for its validation
    accuracy, so that its gap is smaller than what the recipe leads to. Of a training that failed, `right` is None,
    the figures are NaN and `failure` says why.
    `findings`: the rules of the diagnosis that fired. `made_on`: device and precision, such as `cpu fp32`.
    `smaller_batch`: the batch size that it was trained with, where memory did not suffice for its own (else 0).
    """

    arm: str
    seed: int
    right: NDArray[np.bool_] | None = field(repr=False)
    train_accuracy: float
    val_accuracy: float
    val_loss: float
    seconds: float
    usd: float
    epochs: int
    updates: int
    failure: str = ""
    findings: tuple[str, ...] = ()
    gap: float = float("nan")
    made_on: str = ""
    last_val_accuracy: float = float("nan")
    smaller_batch: int = 0
    loss_gap: float = float("nan")


@dataclass(frozen=True)
class Difference:
    """What an arm has more than another, seed by seed; no interval where the seeds have no spread.

    The interval is one of `statements` and has its `confidence` alone.
    """

    by_seed: tuple[float, ...]
    statements: int
    confidence: float
    interval: Estimate | None

    @property
    def value(self) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.by_seed)) if self.by_seed else float("nan")

    @property
    def is_clear(self) -> bool:
        """Return whether chance over seeds is ruled out: the interval does not hold zero."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)

    @property
    def p(self) -> float | None:
        """Return the p value of the t test, corrected as the interval is."""
        p = mean_p(self.by_seed)
        return None if p is None else min(1.0, p * self.statements)

    @property
    def seeds_to_settle(self) -> int | None:
        """Return with how many seeds as large an effect would be found in four of five studies."""
        return seeds_to_settle(self.by_seed, self.confidence)


@dataclass(frozen=True)
class Images:
    """Images that the arm answers rightly with more seeds than the other (`won`), or with fewer (`lost`)."""

    won: int
    lost: int
    p: float  # of McNemar's exact test, corrected


@dataclass(frozen=True)
class Comparison:
    """An arm less a reference over the seeds that both finished, of `planned` ones; none: nothing to compare.

    `significance`: below it, the question's p values rule chance out.
    """

    arm: str
    reference: str
    seeds: tuple[int, ...]
    planned: int
    significance: float
    accuracy: Difference
    gap: Difference
    images: Images
    usd: tuple[float, ...] = ()  # dollars that a training costs more, by seed
    loss_gap: Difference | None = None  # None where a loss is not known

    @property
    def is_clear(self) -> bool:
        """Return whether chance over seeds is ruled out for any of its differences."""
        return any(d is not None and d.is_clear for d in (self.accuracy, self.gap, self.loss_gap))

    @property
    def usd_more(self) -> Estimate | None:
        """Return what a training costs more, with the t interval over seeds; None without a spread."""
        return mean_interval(self.usd, self.accuracy.confidence)

    @property
    def usd_per_point(self) -> Estimate | None:
        """Return the dollars that a training costs more for each point of accuracy that it gains.

        Of an arm that loses accuracy: the dollars saved for each point lost. None where chance is not ruled out
        for the gain: a ratio to what may be nothing has no bounds (Fieller).
        """
        if not self.accuracy.is_clear or not any(self.usd):
            return None
        points = [100 * gain for gain in self.accuracy.by_seed]
        return ratio_interval(self.usd, points, self.accuracy.confidence)


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each arm, in the order in which the arms come."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.arm, []).append(result)
    return found


def compare(results: Sequence[Result], *, reference: str, pairs: bool, confidence: float) -> list[Comparison]:
    """Compare all arms with the reference, or all pairs of arms."""
    grouped = by_arm(results)
    arms = {arm: {r.seed: r for r in found if r.right is not None} for arm, found in grouped.items()}
    couples = (
        list(itertools.combinations(arms, 2)) if pairs else [(reference, arm) for arm in arms if arm != reference]
    )
    shared = {couple: sorted(arms[couple[0]].keys() & arms[couple[1]].keys()) for couple in couples}
    statements = 2 * sum(len(seeds) > 1 for seeds in shared.values())
    images = _all_images(arms, shared)
    losses = {
        (base, arm): [arms[arm][s].loss_gap - arms[base][s].loss_gap for s in seeds]
        for (base, arm), seeds in shared.items()
    }
    known = {couple: by_seed for couple, by_seed in losses.items() if by_seed and np.isfinite(by_seed).all()}
    of_losses = sum(len(by_seed) > 1 for by_seed in known.values())
    return [
        Comparison(
            arm=arm,
            reference=base,
            seeds=tuple(seeds),
            planned=max(len(grouped[base]), len(grouped[arm])),
            significance=round(1 - confidence, 9),
            accuracy=_difference(
                [arms[arm][s].val_accuracy - arms[base][s].val_accuracy for s in seeds],
                confidence,
                statements,
                1.0,
            ),
            gap=_difference([arms[arm][s].gap - arms[base][s].gap for s in seeds], confidence, statements, 2.0),
            images=images[base, arm],
            usd=tuple(arms[arm][s].usd - arms[base][s].usd for s in seeds),
            loss_gap=(
                _difference(known[base, arm], confidence, of_losses, float("inf"))
                if (base, arm) in known
                else None
            ),
        )
        for (base, arm), seeds in shared.items()
    ]


def _difference(by_seed: Sequence[float], confidence: float, statements: int, most: float) -> Difference:
    """Return the difference; its interval stays within what is possible, ±`most`."""
    own = each_of(statements, confidence)
    found = mean_interval(by_seed, own)
    interval = Estimate(found.value, max(found.low, -most), min(found.high, most)) if found else None
    return Difference(tuple(by_seed), statements, own, interval)


def _all_images(
    arms: Mapping[str, Mapping[int, Result]], shared: Mapping[tuple[str, str], Sequence[int]]
) -> dict[tuple[str, str], Images]:
    counts = {}
    for (base, arm), seeds in shared.items():
        more = sum(_rightly(arms[arm][s]).astype(int) - _rightly(arms[base][s]) for s in seeds)
        counts[base, arm] = (int(np.sum(np.greater(more, 0))), int(np.sum(np.less(more, 0))))
    compared = [couple for couple, seeds in shared.items() if seeds]
    p_values = dict(zip(compared, holm([mcnemar(*counts[couple]) for couple in compared]), strict=True))
    return {couple: Images(*counts[couple], p_values.get(couple, 1.0)) for couple in shared}


def _rightly(result: Result) -> NDArray[np.bool_]:
    assert result.right is not None
    return result.right
