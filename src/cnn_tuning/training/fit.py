"""fit(): the one way to train. Recipe and packed data in; the best network, its history and times out."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.utilities.model_summary import ModelSummary

from cnn_tuning.config import Recipe, patch
from cnn_tuning.data.batches import DataModule
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.machine import usable_cores
from cnn_tuning.models.bundle import Specification
from cnn_tuning.models.network import Network
from cnn_tuning.training.assembly import assemble
from cnn_tuning.training.classifier import Classifier, Diverged
from cnn_tuning.training.features import FeatureData
from cnn_tuning.training.progress import FitProgress
from cnn_tuning.training.resume import Keeper, State
from cnn_tuning.training.start import specification_of, tell_of_start


class OutOfMemory(UserError):
    """The device or the machine has too little memory for the recipe."""


__all__ = ["Diverged", "Fitted", "OutOfMemory", "fit", "layer_table"]

Log = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Fitted:
    """What a fit gives: the best network in evaluation mode on the CPU, and how it came about.

    `recipe` is the one that was followed: of a smaller batch than asked for where memory ran out and
    `trainer.on_out_of_memory` says so.
    `history`: a row an epoch (`epoch`, `step`, `split/metric`); `best`: the row that `monitor` chose.
    `seconds`: wall time of `setup`, `fit` and its part `train` (without measuring). `layers`: a table.
    `state` is what a repetition would go on from: remove it once the results are written. `features`: what the
    frozen backbone makes of the pictures, where the head was trained on that.
    """

    recipe: Recipe
    network: Network
    state: State
    specification: Specification
    history: list[dict[str, Any]]
    best: dict[str, Any]
    seconds: dict[str, float]
    samples_per_second: float
    resumed_from: int
    layers: str
    device: str
    precision: str
    threads: int
    features: FeatureData | None = None


def fit(
    recipe: Recipe,
    data: PackedData,
    *,
    state_folder: Path,
    log: Log | None = None,
    callbacks: Sequence[Callback] = (),
    name: str = "train",
    brief: bool = False,
) -> Fitted:
    """Train by the recipe, going on from an interrupted fit of the same recipe, data and code.

    `log` receives `split/metric` values and the step after each epoch. `brief`: no line an epoch in a log file.

    Raises:
        Interrupted: a signal came; the state is saved.
        Diverged: the loss is no longer finite.
        OutOfMemory: there is too little memory, and no smaller batch is to be tried.
        UserError: the recipe does not fit the data or the device.
    """
    while True:
        try:
            return _fit(recipe, data, state_folder, log, callbacks, name, brief)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            settings, reason = recipe.trainer, str(error).splitlines()[0][:200]
        # Outside the handler, where the failed step's tensors are no longer held by the exception.
        gc.collect()
        torch.cuda.empty_cache()
        if settings.on_out_of_memory == "fail" or settings.batch_size == 1:
            raise OutOfMemory(
                f"out of memory at batch size {settings.batch_size} ({reason}): lower trainer.batch_size, or set "
                "trainer.on_out_of_memory: halve_batch"
            )
        recipe = patch(recipe, {"trainer.batch_size": settings.batch_size // 2})
        print(
            f"{name}: out of memory at batch size {settings.batch_size}, "
            f"starting anew with {recipe.trainer.batch_size}",
            file=sys.stderr,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _fit(
    recipe: Recipe,
    data: PackedData,
    state_folder: Path,
    log: Log | None,
    callbacks: Sequence[Callback],
    name: str,
    brief: bool,
) -> Fitted:
    began = time.monotonic()
    device, precision = _place(recipe)
    threads = _prepare_process(recipe)
    state = State(state_folder, recipe, data.meta.digest)
    for line in state.explain_others():
        print(line, file=sys.stderr)
    state.open()
    specification = specification_of(recipe, data.meta)
    tell_of_start(recipe, specification)
    whole, learner, learnt = assemble(recipe, data, specification, device, precision, name)
    batches = DataModule(learnt, recipe, device)
    per_epoch = len(batches.train)
    module = Classifier(learner, recipe, per_epoch * recipe.trainer.max_epochs, per_epoch)
    keeper = Keeper(state, recipe.trainer.monitor, recipe.trainer.checkpoint_every_s)
    clock = _Clock(log)
    checkpoint = state.newest()
    shown = FitProgress(recipe.trainer.batch_size, name, brief)
    trainer = _trainer(recipe, precision, device, [*callbacks, clock, shown, keeper])
    resumed_from = _position(checkpoint, batches, module)
    layers = layer_table(whole, specification.shape)
    ready = time.monotonic()
    trainer.fit(module, batches, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    done = time.monotonic()
    network = specification.build() if learner is whole else whole.cpu().to(memory_format=torch.contiguous_format)
    best = {name: tensor.cpu() for name, tensor in keeper.best_weights.items()}
    network.load_state_dict(best if learner is whole else {**network.state_dict(), **best})
    return Fitted(
        recipe=recipe,
        network=network.eval(),
        state=state,
        specification=specification,
        history=keeper.history,
        best=keeper.best,
        seconds={"setup": ready - began, "fit": done - ready, "train": clock.training},
        samples_per_second=clock.samples / max(clock.training, 1e-9),
        resumed_from=resumed_from,
        layers=layers,
        device=str(device),
        precision=precision,
        threads=threads,
        features=learnt if isinstance(learnt, FeatureData) else None,
    )


def layer_table(network: Network, shape: tuple[int, int, int]) -> str:
    """Return a table of layers: input and output shapes, parameters, floating-point operations."""

    class Shown(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(network).cpu().eval()
            self.example_input_array = torch.zeros(1, *shape)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images)

    return str(ModelSummary(Shown(), max_depth=4))


class _Clock(Callback):
    """Wall time of learning, without the measuring between epochs; logs each epoch's figures."""

    def __init__(self, log: Log | None) -> None:
        self.send = log
        self.training = self.since = 0.0
        self.samples = 0

    def state_dict(self) -> dict[str, Any]:
        return {"training": self.training + time.monotonic() - self.since, "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training, self.samples = state_dict["training"], state_dict["samples"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch[1])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.training += time.monotonic() - self.since

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.since = time.monotonic()
        if self.send is not None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.send({**pl_module.measured, "train/learning_rate": rate}, trainer.global_step)


def _place(recipe: Recipe) -> tuple[torch.device, str]:
    """Return the device and Lightning's name of the precision."""
    wanted = recipe.trainer.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator: gpu, but torch sees none; use auto, or see `make doctor`")
    on_gpu = wanted != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    precision = recipe.trainer.precision
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported(False) else "16") if on_gpu else "32"
    if precision == "16" and not on_gpu:
        raise UserError("trainer.precision: 16 needs a GPU; use 32 or bf16 on a CPU")
    return device, {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[precision]


def _prepare_process(recipe: Recipe) -> int:
    """Seed every generator, fix the number of threads, silence what is not for a person; return threads."""
    threads = recipe.trainer.threads or usable_cores()
    torch.set_num_threads(threads)
    # Deterministic mode would also fill every fresh tensor with NaN: a cost with nothing to find here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return threads


def _trainer(recipe: Recipe, precision: str, device: torch.device, callbacks: list[Callback]) -> pl.Trainer:
    settings = recipe.trainer
    if settings.early_stopping is not None:
        stopping = settings.early_stopping
        mode = "min" if settings.monitor.endswith("loss") else "max"
        callbacks = [
            EarlyStopping(settings.monitor, stopping.min_delta, stopping.patience, mode=mode),
            *callbacks,
        ]
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=settings.max_epochs,
        gradient_clip_val=settings.gradient_clip or None,
        deterministic="warn" if settings.deterministic else False,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _position(checkpoint: Path | None, batches: DataModule, module: Classifier) -> int:
    """Let the data go on at the checkpoint's step, and return that step (0: from the start)."""
    if checkpoint is None:
        return 0
    try:
        step = torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint} is no checkpoint of ours and is not loaded ({reason}): remove it") from None
    batches.train.begin_at(*divmod(step, module.steps_per_epoch))
    print(f"going on from {checkpoint} at step {step} of {module.steps}", file=sys.stderr)
    return step
