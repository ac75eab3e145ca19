"""The one LightningModule: any network of `models`, cross-entropy, and what is measured each epoch."""

from __future__ import annotations

import math
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cnn_tuning.config import Recipe
from cnn_tuning.data.batches import Purpose, seed_of
from cnn_tuning.errors import UserError
from cnn_tuning.models.network import Network
from cnn_tuning.training.finetune import finetuning_of
from cnn_tuning.training.optimisation import build_optimizer, build_schedule
from cnn_tuning.training.ranks import ALONE, Beside, Ranks

MEASURED = ("train", "val")
WATCHED_STEPS = 50
# As torchvision's references train Inception v3; its authors took 0.3.
AUXILIARY_WEIGHT = 0.4


class Diverged(UserError):
    """The loss is no longer finite."""


def training_loss(answers: Tensor | tuple[Tensor, ...], labels: Tensor, label_smoothing: float) -> Tensor:
    """Return what is learnt from: cross-entropy, and a part of that of auxiliary logits where there are some."""
    logits, *auxiliary = answers if isinstance(answers, tuple) else (answers,)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for more in auxiliary:
        loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(more, labels, label_smoothing=label_smoothing)
    return loss


class Classifier(pl.LightningModule):
    """Fits a network by a recipe.

    `train/*` and `val/*` are measured alike: after an epoch, in evaluation mode, on unaugmented images,
    without label smoothing, with the averaged weights where the recipe averages. Where several processes train
    together, losses and measurements are those of all of them, the same in each.
    """

    def __init__(
        self, network: Network, recipe: Recipe, steps: int, steps_per_epoch: int, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.ranks = network, recipe, ranks
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.finetuning = finetuning_of(network, recipe)
        decay = recipe.trainer.ema_decay
        self.averaged = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
        )
        if self.averaged is not None:
            self.averaged.requires_grad_(False)  # no gradient of it is to be waited for
        if recipe.trainer.compile:
            network.compile()
        self.measured: dict[str, float] = {}
        self._sums: list[Tensor] = []
        self._broken_at: Tensor | None = None

    @property
    def measured_network(self) -> Network:
        """Return the network whose accuracy is reported: the averaged one, if there is one."""
        return cast(Network, self.averaged.module) if self.averaged is not None else self.network

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, step), so that a resumed run repeats it, and free what is to learn."""
        freed = self.finetuning is not None and self.finetuning.begin_epoch(self.current_epoch)
        if freed and isinstance(self.trainer.strategy, Beside):
            self.trainer.strategy.wrap_again()
        own = (self.ranks.rank,) if self.ranks.rank else ()
        seed = seed_of(Purpose.DROPOUT, self.recipe.seed, self.global_step, *own)
        # Not torch.manual_seed: without a GPU it keeps a formatted stack of every call for later.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss that is learnt from."""
        images, labels = batch
        loss = training_loss(self.network(images), labels, self.recipe.trainer.label_smoothing)
        if self.ranks.world > 1:
            loss = self._of_all(loss, len(labels), batch_idx)
        self._watch(loss.detach())
        return loss

    def _of_all(self, loss: Tensor, count: int, batch_idx: int) -> Tensor:
        """Return the whole batch's loss with the gradient of this process's part of it.

        Shares are not of equal size: each counts by its images, so that the mean gradient is the whole batch's.
        """
        batches = self.trainer.datamodule.train  # type: ignore[attr-defined]
        loss = loss * (count * self.ranks.world / batches.size_of(batch_idx))
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return loss + (whole / self.ranks.world - loss.detach())

    def _watch(self, loss: Tensor) -> None:
        """Note the first step whose loss is not finite; on a GPU without waiting for it at each step."""
        if self._broken_at is None:
            self._broken_at = torch.full((), -1, device=loss.device)
        at = torch.where(loss.isfinite(), -1, self.global_step)
        self._broken_at = torch.where(self._broken_at < 0, at, self._broken_at)
        if self.device.type == "cpu" or self.global_step % WATCHED_STEPS == 0:
            self._stop_if_broken()

    def _stop_if_broken(self) -> None:
        if self._broken_at is None or int(self._broken_at) < 0:
            return
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        broken = (n for n, tensor in self.network.named_parameters() if not tensor.isfinite().all())
        layer = next(broken, "")
        cause = (
            f"the weights of {layer.rpartition('.')[0] or layer} are not finite"
            if layer
            else "all weights are finite, the logits overflow"
        )
        raise Diverged(
            f"the loss is no longer finite at step {int(self._broken_at)} (learning rate {rate:g}; {cause}): "
            "lower optimizer.learning_rate or set trainer.gradient_clip: 1.0"
        )

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and move the average: before any callback may save both."""
        super().optimizer_step(*arguments, **options)
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)

    def on_validation_epoch_start(self) -> None:
        """Start counting anew; all measure with rank 0's running statistics, the ones that are saved."""
        if self.ranks.world > 1:
            for buffer in self.measured_network.buffers():
                sent = buffer.contiguous()
                dist.broadcast(sent, 0)
                buffer.copy_(sent)
        self._sums = [torch.zeros(3, dtype=torch.float64, device=self.device) for _ in MEASURED]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count loss, hits and images."""
        images, labels = batch
        logits = self.measured_network(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = (logits.argmax(1) == labels).sum()
        self._sums[dataloader_idx] += torch.stack([loss, hits, hits.new_tensor(len(labels))]).double()

    def on_validation_epoch_end(self) -> None:
        """Keep `split/loss` and `split/accuracy` of this epoch in `measured`."""
        self.measured = {}
        if self.ranks.world > 1:
            for sums in self._sums:
                dist.all_reduce(sums)
        for split, sums in zip(MEASURED, self._sums, strict=True):
            loss, hits, count = sums.tolist()
            self.measured |= {f"{split}/loss": loss / count, f"{split}/accuracy": hits / count}
        self._stop_if_broken()
        self.log_dict(self.measured)
        if not math.isfinite(self.measured["train/loss"]):
            raise Diverged(
                f"the measured loss is not finite after step {self.global_step}: "
                "lower optimizer.learning_rate or set trainer.gradient_clip: 1.0"
            )

    def on_train_epoch_end(self) -> None:
        """Let all stop where one is to stop: rules are asked in rank 0 only."""
        if self.ranks.world > 1:
            stop = self.trainer.strategy.reduce_boolean_decision(self.trainer.should_stop, all=False)
            self.trainer.should_stop = stop

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimizer and schedule."""
        # Lightning refuses to clip gradients for a fused optimizer under mixed precision.
        fused = not self.recipe.trainer.gradient_clip
        shares = self.finetuning.shares() if self.finetuning is not None else None
        optimizer = build_optimizer(self.network, self.recipe.optimizer, fused=fused, shares=shares)
        schedule = build_schedule(optimizer, self.recipe.schedule, self.steps, self.steps_per_epoch)
        if isinstance(schedule, ReduceLROnPlateau):
            settings = {"scheduler": schedule, "interval": "epoch", "monitor": "val/loss"}
        else:
            settings = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": settings}
