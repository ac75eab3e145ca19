"""What one process trains with: recipe and place in; device, threads, data, network and trainer out."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping

from cnn_tuning.config import Recipe
from cnn_tuning.data.batches import DataModule, SplitData
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.machine import usable_cores
from cnn_tuning.models.bundle import Specification
from cnn_tuning.models.network import Network
from cnn_tuning.training.assembly import assemble
from cnn_tuning.training.classifier import Classifier
from cnn_tuning.training.ranks import ALONE, Beside, Ranks, agree_on


@dataclass(frozen=True)
class Engine:
    """`whole`: the network; `learner`: the part that is trained; `learnt`: the data that it sees."""

    whole: Network
    learner: Network
    learnt: SplitData
    batches: DataModule
    module: Classifier


def build(
    recipe: Recipe,
    data: PackedData,
    specification: Specification,
    ranks: Ranks,
    place: tuple[torch.device, str],
    name: str,
) -> Engine:
    """Return a process's part. All but rank 0 need no first weights: they are given its own."""
    whole, learner, learnt = assemble(recipe, data, specification, *place, name, blank=ranks.rank > 0)
    if ranks.world > 1 and place[0].type == "cuda":  # torch's has no form for a CPU
        from timm.layers import convert_sync_batchnorm  # torch's own would lose the activations of timm's layers

        learner = whole = convert_sync_batchnorm(whole)
    batches = DataModule(learnt, recipe, place[0], ranks.share, ranks.local_world)
    if ranks.world > 1 and recipe.trainer.stream is not None:
        from cnn_tuning.data.stream import StreamedBatches

        assert isinstance(batches.train, StreamedBatches)
        agree_on({"the index of trainer.stream": batches.train.shards.index.own_digest})
    per_epoch = len(batches.train)
    module = Classifier(learner, recipe, per_epoch * recipe.trainer.max_epochs, per_epoch, ranks)
    return Engine(whole, learner, learnt, batches, module)


def place_of(recipe: Recipe, ranks: Ranks = ALONE) -> tuple[torch.device, str]:
    """Return the device of a process and Lightning's name of the precision."""
    wanted = recipe.trainer.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator: gpu, but torch sees none; use auto, or see `make doctor`")
    on_gpu = wanted != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", _gpu_of(ranks)) if on_gpu else torch.device("cpu")
    precision = recipe.trainer.precision
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported(False) else "16") if on_gpu else "32"
    if precision == "16" and not on_gpu:
        raise UserError("trainer.precision: 16 needs a GPU; use 32 or bf16 on a CPU")
    return device, {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[precision]


def _gpu_of(ranks: Ranks) -> int:
    if ranks.world == 1:
        return torch.cuda.current_device()
    gpus = torch.cuda.device_count()
    if ranks.local_rank < gpus:
        return ranks.local_rank
    if gpus == 1:  # an outer launcher shows each process its own
        return 0
    raise UserError(f"trainer.devices: {ranks.local_world}, but there are {gpus} GPUs here")


def prepare_process(recipe: Recipe, device: torch.device, ranks: Ranks = ALONE) -> int:
    """Seed every generator, fix the number of threads, silence what is not for a person; return threads."""
    threads = recipe.trainer.threads or max(1, usable_cores() // ranks.local_world)
    torch.set_num_threads(threads)
    if device.type == "cuda" and ranks.world > 1:
        torch.cuda.set_device(device)
    # Deterministic mode would also fill every fresh tensor with NaN: a cost with nothing to find here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return threads


def trainer_of(
    recipe: Recipe, place: tuple[torch.device, str], callbacks: Sequence[Callback], ranks: Ranks = ALONE
) -> pl.Trainer:
    """Return Lightning's trainer; each process stops early by itself, as all measure the same."""
    settings, (device, precision) = recipe.trainer, place
    if settings.early_stopping is not None:
        stopping = settings.early_stopping
        mode = "min" if settings.monitor.endswith("loss") else "max"
        callbacks = [
            EarlyStopping(settings.monitor, stopping.min_delta, stopping.patience, mode=mode),
            *callbacks,
        ]
    together: dict[str, Any] = {}
    if ranks.world > 1:
        together = {"strategy": Beside(ranks, device)}
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=settings.max_epochs,
        gradient_clip_val=settings.gradient_clip or None,
        deterministic="warn" if settings.deterministic else False,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **together,
    )
    if ranks.world > 1:
        # Signals are rank 0's own affair (`Keeper`). Lightning would send word of them around at every step, for
        # which a GPU is waited for, and would answer one with a message that the others may not expect.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
