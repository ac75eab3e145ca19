"""How values are drawn and when a trial is given up: configuration in, Optuna's samplers and pruners out."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cnn_tuning.config import PrunerConfig, SearchConfig

Study = optuna.Study

# Those of which each epoch tells a value.
CURVES = ("val/accuracy", "val/loss")


class Seeded(BaseSampler):
    """Any of Optuna's samplers, as a function of (seed, trial number, history).

    Optuna's own draw from one stream: reloaded with its seed, a study would repeat its first draws. Here a
    fresh sampler draws for each trial, and for each value that it draws alone, so that a trial which stopped
    between two values goes on with the same ones. What CMA-ES carries over stands in the study.
    `random_share` of the trials, evenly spread over their numbers, are drawn at random.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, random_share: float = 0.0) -> None:
        self.make, self.seed, self.random_share = make, seed, random_share

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the values that are drawn together."""
        return self._fresh(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return them."""
        sampler = self._fresh(trial)
        sampler.infer_relative_search_space(study, trial)  # TPE keeps what it finds there for itself
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a value that is drawn alone."""
        return self._fresh(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _fresh(self, trial: FrozenTrial, *purpose: str) -> BaseSampler:
        key = "\0".join([str(self.seed), str(trial.number), *purpose])
        derived = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
        if is_random(trial.number, self.random_share):
            return optuna.samplers.RandomSampler(seed=derived)
        return self.make(derived)


class Ranked(BaseSampler):
    """A sampler that knows complete trials only, told of those given up as well.

    Without them it would propose again and again what was just given up. Each ended trial counts as complete
    with its rank, as a normal score: those given up below the complete ones, the earlier the lower, and of the
    same epoch by their value. Ranks, because values of different epochs cannot be compared, and one that learnt
    nothing is no more than the last.
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the values that are drawn together."""
        return self.sampler.infer_relative_search_space(*_ranked(study, trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return them."""
        return self.sampler.sample_relative(*_ranked(study, trial), search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a value that is drawn alone."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)


def _ranked(study: Study, trial: FrozenTrial) -> tuple[Study, FrozenTrial]:
    """Return a study in memory that has ranks for values, and the trial in it."""
    from scipy.stats import norm, rankdata

    trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    merits = [_merit(t, sign) for t in ended]
    order = sorted(set(merits))
    scores = norm.ppf((rankdata([order.index(merit) for merit in merits]) - 0.5) / max(1, len(ended)))
    ranked = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler())
    create = optuna.trial.create_trial
    for one, score in zip(ended, scores, strict=True):
        ranked.add_trial(create(params=one.params, distributions=one.distributions, value=float(score)))
    for one in trials:
        if one.state == TrialState.RUNNING:
            running = create(params=one.params, distributions=one.distributions, state=TrialState.RUNNING)
            ranked.add_trial(running)
    ranked.add_trial(create(state=TrialState.RUNNING))
    return ranked, ranked.get_trials(deepcopy=False)[-1]


def _merit(trial: FrozenTrial, sign: int) -> tuple[float, float]:
    """Return by what an ended trial is ranked: how far it came and its value there, the greater the better."""
    if trial.value is not None and trial.state == TrialState.COMPLETE:
        return math.inf, sign * trial.value
    step = trial.last_step
    value = math.nan if step is None else sign * trial.intermediate_values[step]
    return (-math.inf, 0.0) if step is None or math.isnan(value) else (step, value)


def is_random(number: int, share: float) -> bool:
    """Return whether a trial is one of those drawn at random: of each 1/share trials the last."""
    return math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)


def build_sampler(search: SearchConfig, seed: int) -> BaseSampler:
    """Return the sampler of a search."""
    startup = search.sampler.startup_trials
    conditional = any(dimension.when for dimension in search.space.values())

    def make(derived: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # grouping is experimental in Optuna; it is pinned
            if search.sampler.name == "tpe":
                # Of several objectives Optuna's TPE draws each value alone.
                together = search.sampler.multivariate and len(search.objectives) == 1
                return optuna.samplers.TPESampler(
                    n_startup_trials=startup, seed=derived, multivariate=together, group=together and conditional
                )
            if search.sampler.name == "cmaes":
                return optuna.samplers.CmaEsSampler(
                    n_startup_trials=startup, seed=derived, warn_independent_sampling=False
                )
            if search.sampler.name == "gp":
                process = optuna.samplers.GPSampler(
                    n_startup_trials=startup, seed=derived, warn_independent_sampling=False
                )
                return Ranked(process) if len(search.objectives) == 1 else process
        return optuna.samplers.RandomSampler(seed=derived)  # a grid's points are all decided before

    return Seeded(make, seed, search.sampler.random_share)


class Later(BasePruner):
    """Another pruner's verdict, once so many trials are complete."""

    def __init__(self, pruner: BasePruner, startup_trials: int) -> None:
        self.pruner, self.startup_trials = pruner, startup_trials

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether to give the trial up."""
        verdict = self.pruner.prune(study, trial)  # asked in any case: it notes how far this trial came
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return verdict and len(complete) >= self.startup_trials


def build_pruner(search: SearchConfig, epochs: int) -> BasePruner:
    """Return the pruner of a search whose longest trial has so many epochs; steps are epochs, from 1."""
    config: PrunerConfig = search.pruner
    first = max(1, config.warmup_epochs)
    if not reports_epochs(search) and config.name != "wilcoxon":
        return optuna.pruners.NopPruner()
    if config.name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=first)
    if config.name == "asha":
        halving = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first, reduction_factor=config.reduction_factor
        )
        return Later(halving, config.startup_trials)
    if config.name == "hyperband":
        brackets = optuna.pruners.HyperbandPruner(
            min_resource=first, max_resource=max(epochs, first), reduction_factor=config.reduction_factor
        )
        return Later(brackets, config.startup_trials)
    if config.name == "wilcoxon" and len(search.objectives) == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.pruners.WilcoxonPruner(p_threshold=config.p_threshold)
    return optuna.pruners.NopPruner()


def reports_epochs(search: SearchConfig) -> bool:
    """Return whether trials are judged by their curve over the epochs."""
    one = len(search.objectives) == 1 and search.objectives[0].metric in CURVES
    return one and search.pruner.name != "wilcoxon"  # that one is told a value a seed
