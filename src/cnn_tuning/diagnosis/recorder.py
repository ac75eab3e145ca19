"""The callback that records a training: losses, rates, measurements and, at sampled steps, statistics.

recorder = Recorder()
fit(recipe, data, state_folder=…, callbacks=[recorder])
recording = recorder.recording(recipe)   # also after an epoch, or after an exception
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from cnn_tuning.config import Recipe, flatten, to_plain
from cnn_tuning.diagnosis.breakage import UNKNOWN, first_not_finite
from cnn_tuning.diagnosis.probe import Probe
from cnn_tuning.diagnosis.recording import Curves, Recording, Tensors
from cnn_tuning.training.classifier import MEASURED, Classifier, Diverged

DENSE_STEPS = 10
SPARSE_GAP = 64
EPOCH_VALUES = tuple(f"{split}/{value}" for split in MEASURED for value in ("loss", "accuracy"))


def next_sample(step: int) -> int:
    """Return the first sampled step after `step`.

    The first ten, then gaps of half the steps so far up to 64, then of a 64th of them: 17 samples in 200 steps,
    99 in 5,000 and 290 in 100,000.
    """
    at = 0
    while at <= step:
        at += 1 if at < DENSE_STEPS else max(min(at // 2, SPARSE_GAP), at // SPARSE_GAP)
    return at


class Recorder(pl.Callback):
    """Records one training at a time, without `tensors` its curves only.

    A fit that goes on from a checkpoint goes on recording; steps of a fit that was not recorded are NaN.
    """

    def __init__(self, *, tensors: bool = True, after: Callable[[int], int] = next_sample) -> None:
        self._with_tensors, self._after = tensors, after
        self._reset()

    def _reset(self) -> None:
        self._losses: list[float] = []
        self._rates: list[float] = []
        self._epochs: list[dict[str, Any]] = []
        self._pending: list[Tensor] = []
        self._batch: Any = None
        self._broken = ("", -1)
        self._unseen = 0
        self._steps_per_epoch = self._planned_steps = 0
        self._data_digest = ""
        self._probe: Probe | None = None
        self._next, self._sampling = 0, False

    def recording(self, recipe: Recipe) -> Recording:
        """Return all that was recorded of the training by this recipe."""
        return Recording(flatten(to_plain(recipe)), self.curves(), self.tensors())

    def curves(self) -> Curves:
        """Return losses and measurements so far."""
        self._collect()
        loss = np.array(self._losses, np.float32)
        epochs = {
            name.replace("/", "_"): np.array([row[name] for row in self._epochs], np.float32)
            for name in EPOCH_VALUES
        }
        part, step = self._broken
        if step < 0 and self._first_broken():
            part, step = UNKNOWN, self._first_broken()
        return Curves(
            loss=loss,
            learning_rate=np.array(self._rates[: len(loss)], np.float32),
            epoch_step=np.array([row["step"] for row in self._epochs], np.int64),
            **epochs,
            steps_per_epoch=self._steps_per_epoch,
            planned_steps=self._planned_steps,
            not_finite=part,
            not_finite_step=step,
            data_digest=self._data_digest,
        )

    def tensors(self) -> Tensors | None:
        """Return statistics of the sampled steps so far; None before the first."""
        if self._probe is None:
            return None
        self._probe.collect()
        return self._probe.tensors()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, before a checkpoint is restored: the weights are those of the seed."""
        self._reset()
        module = _classifier(pl_module)
        self._steps_per_epoch, self._planned_steps = module.steps_per_epoch, module.steps
        self._data_digest = trainer.datamodule.meta.digest  # type: ignore[attr-defined]
        # Hooks on a compiled network would be traced into it, or not be seen at all.
        if self._with_tensors:
            self._probe = Probe(module.network, hooked=not module.recipe.trainer.compile)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the next step to sample."""
        self._next = self._after(trainer.global_step) if self._probe is not None else -1
        missing = trainer.global_step - len(self._losses)
        if missing > 0:
            self._unseen = trainer.global_step
            self._losses += [float("nan")] * missing
            self._rates += [float("nan")] * missing

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample the first step of stages that are freed now."""
        finetuning, epoch = _classifier(pl_module).finetuning, trainer.current_epoch
        begins = epoch > 0 and trainer.global_step == epoch * self._steps_per_epoch
        if finetuning is None or self._probe is None or not begins:
            return
        if finetuning.free_stages(epoch) != finetuning.free_stages(epoch - 1):
            self._next = trainer.global_step + 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold the batch, and begin a sample where one is due."""
        self._batch = batch
        self._rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self._sampling = trainer.global_step + 1 == self._next
        if self._sampling:
            self._probed.begin(self._next)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure gradients, before they are clipped."""
        if self._sampling:
            self._probed.gradients(_scale_of_gradients(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss on the device, and end the sample."""
        self._pending.append(outputs["loss"])
        if self._sampling:
            self._probed.end()
            self._next, self._sampling = self._after(self._next), False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this epoch's measurements and move all to the CPU."""
        self._epochs.append({"step": trainer.global_step, **_classifier(pl_module).measured})
        self._collect()
        if self._probe is not None:
            self._probe.collect()
            self._probe.compare()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Find what broke first where the loss is no longer finite."""
        self._collect()
        if self._probe is not None:
            self._probe.abandon()
        if not isinstance(exception, Diverged):
            return
        if len(self._rates) > len(self._losses):  # the step that broke gave no loss
            self._losses.append(float("nan"))
        if self._probe is not None:
            self._probe.compare()
        self._broken = first_not_finite(trainer, _classifier(pl_module), self._batch, self._first_broken())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the batch."""
        self._batch = None

    def state_dict(self) -> dict[str, Any]:
        """Return what belongs into a checkpoint."""
        self._collect()
        losses = torch.tensor(self._losses, dtype=torch.float32)
        rates = torch.tensor(self._rates[: len(losses)], dtype=torch.float64)
        state = {"losses": losses, "rates": rates, "epochs": self._epochs, "unseen": self._unseen}
        return state if self._probe is None else {**state, "probe": self._probe.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._losses, self._rates = state_dict["losses"].tolist(), state_dict["rates"].tolist()
        self._epochs, self._unseen = state_dict["epochs"], state_dict["unseen"]
        if self._probe is not None and "probe" in state_dict:
            self._probe.load_state_dict(state_dict["probe"])

    @property
    def _probed(self) -> Probe:
        assert self._probe is not None
        return self._probe

    def _first_broken(self) -> int:
        """Return the first step whose loss is not finite; 0 where all are."""
        broken = ~np.isfinite(self._losses[self._unseen :])
        return self._unseen + int(broken.argmax()) + 1 if broken.any() else 0

    def _collect(self) -> None:
        """Move the losses to the CPU: one transfer, however many steps."""
        pending, self._pending = self._pending, []
        if pending:
            self._losses += torch.stack(pending).float().tolist()


def _classifier(module: pl.LightningModule) -> Classifier:
    assert isinstance(module, Classifier)
    return module


def _scale_of_gradients(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """Return by what gradients are multiplied: fused optimizers take mixed precision's scale off themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
