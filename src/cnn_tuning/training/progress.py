"""What a person sees while a network is fitted: a bar with samples/s and the time left, a line an epoch."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_S = 0.25
BRIEF_S = 30.0


class FitProgress(pl.Callback):
    """On a terminal a live bar over all epochs; in a log one line after each epoch; if brief, twice a minute."""

    def __init__(self, batch_size: int, name: str, brief: bool) -> None:
        self.batch_size, self.name, self.brief = batch_size, name, brief
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.shown = self.began = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar."""
        self.began, self.first_step = time.monotonic(), trainer.global_step
        self.shown = self.began
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]:>7.0f} samples/s  {task.fields[measured]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                auto_refresh=False,
            )
            total = int(trainer.estimated_stepping_batches)
            self.progress.add_task(self.name, total=total, rate=0.0, measured="")
            self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar a few times a second."""
        now = time.monotonic()
        if self.progress is None or now - self.shown < REFRESH_S:
            return
        self.shown = now
        self._show(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say what the epoch measured."""
        m = pl_module.measured
        measured = f"train {m['train/accuracy']:.2%}  val {m['val/accuracy']:.2%}"
        line = (
            f"{self.name}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {measured}  "
            f"val loss {m['val/loss']:.4f}  {self._rate(trainer):.0f} samples/s"
        )
        if self.progress is None and self.brief:
            if time.monotonic() - self.shown < BRIEF_S:
                return
            self.shown = time.monotonic()
        if self.progress is None:
            self.console.print(line, highlight=False, soft_wrap=True)
        else:
            self._show(trainer, measured=measured)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Close the bar."""
        if self.progress is not None:
            self.progress.stop()

    def _rate(self, trainer: pl.Trainer) -> float:
        steps = trainer.global_step - self.first_step
        return steps * self.batch_size / max(time.monotonic() - self.began, 1e-9)

    def _show(self, trainer: pl.Trainer, **fields: Any) -> None:
        assert self.progress is not None
        task = self.progress.task_ids[0]
        self.progress.update(task, completed=trainer.global_step, rate=self._rate(trainer), **fields)
        self.progress.refresh()
