"""What looks at one fit: its callbacks go in, a `Recording` and findings come out.

While it trains, rules look at the curves and statistics after each epoch: what they find is told once, and a
rule whose action is `stop` ends the training after that epoch. `conclude` adds what only the end shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cnn_tuning.config import DiagnosisConfig, Recipe, flatten, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.diagnosis.evidence import gather
from cnn_tuning.diagnosis.judge import check_rules, judge
from cnn_tuning.diagnosis.recorder import Recorder
from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.diagnosis.stopwatch import Stopwatch
from cnn_tuning.tracking.system import Sample
from cnn_tuning.training.fit import Fitted
from cnn_tuning.training.start import say_once


class Watch:
    """Looks at one fit of `recipe`, which takes its `callbacks`.

    One of several to be compared is not told of, nor traced, nor ended by a rule (`stops` false): they stay alike.
    `stopped_by`: the rule that ended the training, if one did.
    """

    def __init__(self, recipe: Recipe, config: DiagnosisConfig, name: str, *, stops: bool = True) -> None:
        check_rules(config)
        if recipe.trainer.profile and not stops:
            say_once("trainer.profile: trainings that are compared are not traced: tens of MB for each of them")
        self.recipe, self.config, self.name = recipe, config, name
        self.recorder, self.stopwatch = Recorder(tensors=config.record), Stopwatch()
        self.stopped_by = ""
        self.callbacks: list[Callback] = [self.stopwatch, self.recorder, *([_Live(self)] if stops else [])]

    def so_far(self) -> Recording:
        """Return the curves and statistics up to now."""
        return Recording(flatten(to_plain(self.recipe)), self.recorder.curves(), self.recorder.tensors())

    def broken_off(self, samples: Sequence[Sample] = ()) -> Recording:
        """Return what is known of a fit that failed or was given up; `samples` are its run's system metrics."""
        return replace(self.so_far(), times=self.stopwatch.times(samples))

    def conclude(self, fitted: Fitted, data: PackedData, samples: Sequence[Sample] = ()) -> Recording:
        """Return all that is known of a fit that has ended; `samples` are its run's system metrics."""
        device = torch.device(fitted.device)
        evidence = gather(fitted.network, data, fitted.recipe, device, fitted.features)
        times = self.stopwatch.times(samples)
        recipe = flatten(to_plain(fitted.recipe))
        return replace(self.so_far(), recipe=recipe, data=evidence, times=times)


class _Live(Callback):
    """Judges after each epoch, tells what is new, and ends the training where a rule says so."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.told: set[str] = set()
        rules = watch.config.rules.items()
        # Part of what an interrupted fit belongs to (`training.fit`).
        self.decides = {
            f"diagnosis.stopping.{name}": rule.thresholds for name, rule in rules if rule.action == "stop"
        }

    def state_dict(self) -> dict[str, Any]:
        return {"told": sorted(self.told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.told = set(state_dict["told"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        watch = self.watch
        last = trainer.current_epoch + 1 == trainer.max_epochs
        for finding in judge(watch.so_far(), watch.config):
            if finding.status != "fired":
                continue
            stops = watch.config.rules[finding.rule].action == "stop" and not last
            if finding.rule not in self.told:
                end = "; the training stops here" if stops else ""
                # What to do about it is told at the end, when all is known.
                print(f"{watch.name}: {finding.rule}: {finding.explanation}{end}", file=sys.stderr)
            self.told.add(finding.rule)
            if stops and not watch.stopped_by:
                watch.stopped_by = finding.rule
                trainer.should_stop = True
