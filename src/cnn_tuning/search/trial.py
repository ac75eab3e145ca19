"""One trial: its recipe goes in, is fitted with each seed as any other, and the objectives' values come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, cast

import optuna
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from cnn_tuning.config import DiagnosisConfig, Recipe, SearchConfig, patch
from cnn_tuning.data.packed import PackedData
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.reports.training import judge_and_record
from cnn_tuning.search.samplers import reports_epochs
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.classifier import Classifier
from cnn_tuning.training.fit import Diverged, Fitted, fit
from cnn_tuning.training.resume import Keeper

# A value at a step goes out, whether to give the trial up comes back; raises `Lost`.
Report = Callable[[float, int], bool]


@dataclass
class Spent:
    """What a trial has cost so far, over all its seeds; kept with it in the study.

    `smaller_batch`: the batch size that it was trained with, where memory did not suffice for its own (else 0).
    """

    epochs: int = 0
    updates: int = 0
    threads: int = 0
    device: str = ""
    smaller_batch: int = 0

    def attrs(self) -> dict[str, Any]:
        """Return it as attributes of the trial."""
        return asdict(self)


class EachEpoch(Callback):
    """After each epoch: counts it, tells the study, and gives up where the pruner says so.

    What earlier tries measured is logged first, so that the run has the whole curve. `pass_on` is called after
    each step: a signal that came before the fit listened to signals is passed on to it.
    """

    def __init__(
        self,
        spent: Spent,
        tracked: Run | None,
        judge: Report | None,
        metric: str,
        pass_on: Callable[[], None],
        batch_size: int,
    ) -> None:
        self.spent, self.tracked, self.judge, self.metric, self.pass_on = spent, tracked, judge, metric, pass_on
        self.batch_size = batch_size
        self.before = spent.epochs, spent.updates

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured in earlier tries."""
        self.spent.threads, self.spent.device = torch.get_num_threads(), str(pl_module.device)
        for keeper in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(keeper, Keeper):
                given = keeper.state.recipe["trainer.batch_size"]
                if given != self.batch_size:
                    self.spent.smaller_batch = given
                for row in keeper.history:
                    self._count(row["epoch"], row["step"])
                    if self.tracked is not None:
                        self.tracked.log_metrics({k: v for k, v in row.items() if "/" in k}, row["step"])

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Pass a signal on."""
        self.pass_on()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell this epoch's value."""
        epoch = trainer.current_epoch + 1
        self._count(epoch, trainer.global_step)
        if self.judge is None:
            return
        give_up = self.judge(cast(Classifier, pl_module).measured[self.metric], epoch)
        # After its last epoch a trial is complete, whatever the pruner thinks of it.
        if give_up and epoch != trainer.max_epochs:
            raise optuna.TrialPruned(f"given up after epoch {epoch} of {trainer.max_epochs}")

    def _count(self, epoch: int, step: int) -> None:
        self.spent.epochs, self.spent.updates = self.before[0] + epoch, self.before[1] + step


def run_trial(
    search: SearchConfig,
    recipe: Recipe,
    data: PackedData,
    state: Path,
    *,
    name: str,
    spent: Spent,
    report: Report,
    tracked: Run,
    pass_on: Callable[[], None],
    diagnosis: DiagnosisConfig,
    price_per_hour: float,
) -> list[float]:
    """Fit a trial's recipe with each of its seeds and return the mean value of each objective.

    Raises:
        TrialPruned: it was given up.
        Interrupted: a signal came; what was done is kept below `state`.
        Lost: another process has it now.
        Exception: what a fit raises.
    """
    metric = search.objectives[0].metric
    results: list[list[float]] = []
    for number in range(search.seeds):
        first = number == 0
        judge = report if first and reports_epochs(search) else None
        each = EachEpoch(spent, tracked if first else None, judge, metric, pass_on, recipe.trainer.batch_size)
        seeded = patch(recipe, {"seed": recipe.seed + number})
        watch = Watch(seeded, diagnosis, name, stops=False)
        try:
            fitted = fit(
                seeded,
                data,
                state_folder=state / str(number),
                log=tracked.log_metrics if first else None,
                callbacks=[*watch.callbacks, each],
                name=f"{name}, seed {seeded.seed}" if search.seeds > 1 else name,
            )
        except (Diverged, optuna.TrialPruned):
            if first:
                recording = watch.broken_off(tracked.system_samples())
                judge_and_record(tracked, state, seeded, recording, diagnosis, name)
            raise
        if first:
            recording = watch.conclude(fitted, data, tracked.system_samples())
            judge_and_record(tracked, state, fitted.recipe, recording, diagnosis, name)
        results.append([_value(o.metric, fitted, price_per_hour) for o in search.objectives])
        give_up = search.pruner.name == "wilcoxon" and report(results[-1][0], number)
        if give_up and number + 1 < search.seeds:
            raise optuna.TrialPruned(f"given up after {number + 1} of {search.seeds} seeds")
    return _means(results)


def _means(results: Sequence[Sequence[float]]) -> list[float]:
    return [mean(values) for values in zip(*results, strict=True)]


def _value(metric: str, fitted: Fitted, price_per_hour: float) -> float:
    if metric == "time/train_seconds":
        return fitted.seconds["train"]
    if metric == "cost/usd":
        return fitted.seconds["train"] / 3600 * price_per_hour
    if metric == "model/parameters":
        return float(sum(p.numel() for p in fitted.network.parameters()))
    return float(fitted.best[metric])
