"""Epochs that a search spends until it is as good as the best of 30 random trials of full length.

    python bench/search.py [--seeds 5] [--trials 30] [--with "search.sampler.random_share=0 …"]

For each seed: N random trials run to their end, and the best validation accuracy that any of them showed after
any epoch is the target. Then ours, with the sampler and the pruner of `search=thorough`, until a trial shows the
target after an epoch; each `--with` adds a search with other settings against the same targets. The ratio is
ours to all epochs of the random search, which does not know its best before its end. A search that has spent as
much without the target is stopped and counts as 1. Neither starts from the experiment's own values, and no draw
is common to both.

What this is and is not: MNIST at 8×8 with 1,000 training images, a small network, 7 dimensions of which the
learning rate, the batch size and the width matter most; one worker. The target is the luckiest of N × epochs
measurements, so part of it is chance, for both alike. Therefore 4,000 validation images, not fewer: half as many
would let luck decide more and the values less. And 8×8 pixels rather than more: the best are then at about 95 %,
where values still tell, and a training is cheap enough for that many images. Single ratios scatter widely still.

What a training showed after each epoch is kept in `scratch/bench/search/curves` under its recipe, data and code.
A run that was stopped goes on from there, and another search against the same targets trains only its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import optuna
import pytorch_lightning as pl
from workplace import FOLDER, machine, stage

from cnn_tuning.config import (
    Choice,
    Dimension,
    FloatRange,
    Recipe,
    SamplerConfig,
    SearchConfig,
    compose,
    patch,
    select,
)
from cnn_tuning.data.packed import PackedData
from cnn_tuning.search.samplers import build_pruner, build_sampler
from cnn_tuning.search.space import suggest, trial_recipe
from cnn_tuning.training.fit import Diverged, fit
from cnn_tuning.training.resume import State

EPOCHS = 16
DATA = ["data.limit=5000", "data.val_samples=4000", "data.image.size=[8,8]"]
RECIPE = [
    *("experiment=mnist_fast", "model=compact_cnn_small", "model.dropout=both", "trainer.threads=1"),
    *(f"trainer.max_epochs={EPOCHS}", "trainer.train_eval_samples=100", "trainer.eval_batch_size=1000"),
    "trainer.checkpoint_every_s=3600",
]
SPACE: dict[str, Dimension] = {
    "optimizer.learning_rate": FloatRange("float", 1e-4, 1.0, log=True),
    "optimizer.weight_decay": FloatRange("float", 1e-4, 1.0, log=True),
    "model.conv_dropout": FloatRange("float", 0.0, 0.6),
    "model.dense_dropout": FloatRange("float", 0.0, 0.6),
    "trainer.label_smoothing": FloatRange("float", 0.0, 0.4),
    "trainer.batch_size": Choice("categorical", [32, 64, 128, 256, 512]),
    "model.arguments.widths": Choice("categorical", {"narrow": [8, 8], "medium": [16, 16], "wide": [32, 32]}),
}

# After each epoch of a trial: its number from 1 and the validation accuracy come in.
EachEpoch = Callable[[int, float], None]


class Reached(Exception):
    """The target was shown."""


def main() -> None:
    """Search with each seed at random and as shipped; print epochs and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=30, help="of the random search")
    parser.add_argument("--with", action="append", default=[], dest="others", metavar="OVERRIDES")
    options = parser.parse_args()
    print(machine(), flush=True)
    searches = {text or "as shipped in search=thorough": _search(text) for text in ("", *options.others)}
    for name, search in searches.items():
        print(f"{name} is {search.sampler}, {search.pruner}", flush=True)
    recipe, data = select(Recipe, compose(RECIPE, params=None)), _data()
    ratios: dict[str, list[float]] = {name: [] for name in searches}
    for seed in range(options.seeds):
        began = time.monotonic()
        seeded = patch(recipe, {"seed": seed})
        target, random_epochs = at_random(seeded, data, options.trials)
        print(
            f"seed {seed}: best of {options.trials} random trials {target:.2%} in {random_epochs} epochs "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        for name, search in searches.items():
            began = time.monotonic()
            epochs, trials, reached = until(target, search, seeded, data, random_epochs)
            ratios[name].append(min(1.0, epochs / random_epochs))
            print(
                f"  {name}: {'reached' if reached else 'not reached'} in {epochs} epochs, {trials} trials: "
                f"{ratios[name][-1]:.2f} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    for name, values in ratios.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        mean, median = statistics.mean(values), statistics.median(values)
        print(f"{name}, to random: mean {mean:.2f}{spread}, median {median:.2f}")


def _search(overrides: str) -> SearchConfig:
    """Return the sampler and the pruner of `search=thorough`, with overrides, in the space of this comparison."""
    config = compose([*RECIPE, "search=thorough", *overrides.split()], params=None)
    return replace(config.search, space=SPACE, settings={}, seeds=1)


def at_random(recipe: Recipe, data: PackedData, trials: int) -> tuple[float, int]:
    """Return the best accuracy that random, unpruned trials showed, and their epochs."""
    search = replace(_search(""), sampler=SamplerConfig("random"))
    study = optuna.create_study(direction="maximize", sampler=build_sampler(search, recipe.seed))
    seen: list[float] = []
    for _ in range(trials):
        trial = study.ask()
        _fit(search, recipe, data, trial, lambda epoch, accuracy: seen.append(accuracy))
    return max(seen), len(seen)


def until(
    target: float, search: SearchConfig, recipe: Recipe, data: PackedData, most: int
) -> tuple[int, int, bool]:
    """Search until the target is shown; return epochs and trials spent, and whether it was reached."""
    study = optuna.create_study(
        study_name=f"seed {recipe.seed}",  # Hyperband assigns brackets by it
        direction="maximize",
        sampler=build_sampler(search, 1000 + recipe.seed),
        pruner=build_pruner(search, EPOCHS),
    )
    seen: list[float] = []
    while len(seen) < most:
        trial = study.ask()

        def judge(epoch: int, accuracy: float, trial: optuna.Trial = trial) -> None:
            seen.append(accuracy)
            if accuracy >= target:
                raise Reached
            trial.report(accuracy, epoch)
            if epoch < EPOCHS and trial.should_prune():
                raise optuna.TrialPruned

        try:
            best = _fit(search, recipe, data, trial, judge)
        except Reached:
            return len(seen), len(study.trials), True
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, best, state=None if best is not None else optuna.trial.TrialState.FAIL)
    return len(seen), len(study.trials), False


class _After(pl.Callback):
    def __init__(self, each: EachEpoch) -> None:
        self.each = each

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.each(trainer.current_epoch + 1, pl_module.measured["val/accuracy"])


def _fit(
    search: SearchConfig, recipe: Recipe, data: PackedData, trial: optuna.Trial, each: EachEpoch
) -> float | None:
    """Train a trial and return its best accuracy, or None where it diverged.

    What a training showed is kept under its recipe, data and code, and shown again without training.
    """
    varied = trial_recipe(search, recipe, suggest(trial, search))
    states = FOLDER / "search/state"
    file = FOLDER / "search/curves" / f"{State(states, varied, data.meta.digest).path.name}.json"
    curve: list[float] = json.loads(file.read_text()) if file.exists() else []
    for epoch, accuracy in enumerate(curve, start=1):
        each(epoch, accuracy)
    if len(curve) < EPOCHS:
        shown = len(curve)

        def show(epoch: int, accuracy: float) -> None:
            if epoch > shown:
                curve.append(accuracy)
                each(epoch, accuracy)

        shutil.rmtree(states, ignore_errors=True)
        try:
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
                fit(varied, data, state_folder=states, callbacks=[_After(show)])
        except Diverged:
            return None
        finally:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(curve))
    return max(curve)


def _data() -> PackedData:
    folder = FOLDER / f"search/{hashlib.sha256(repr(DATA).encode()).hexdigest()[:8]}"
    if not (folder / "data/prepared/meta.json").exists():
        stage("fetch", *RECIPE, *DATA, outputs=folder)
        stage("preprocess", *RECIPE, *DATA, inputs=folder, outputs=folder)
    return PackedData.open(folder / "data/prepared")


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main()
