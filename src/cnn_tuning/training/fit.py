"""fit(): the one way to train. Recipe and packed data in; the best network, its history and times out."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.model_summary import ModelSummary

from cnn_tuning.config import Recipe, patch, to_plain
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.shards import index_for
from cnn_tuning.data.shards import place_of as place_of_shards
from cnn_tuning.errors import UserError
from cnn_tuning.models.bundle import Specification
from cnn_tuning.models.network import Network
from cnn_tuning.training.classifier import Diverged
from cnn_tuning.training.engine import Engine, build, place_of, prepare_process, trainer_of
from cnn_tuning.training.features import FeatureData
from cnn_tuning.training.memory import is_out_of_memory
from cnn_tuning.training.progress import FitProgress
from cnn_tuning.training.ranks import least_batch, outer_ranks, told_by_first, with_devices
from cnn_tuning.training.resume import Keeper, State
from cnn_tuning.training.start import specification_of, tell_of_start
from cnn_tuning.training.together import together


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
    `seconds`: wall time of `setup`, `fit` and its part `train` (without measuring); but for `setup` with what was
    trained before an interruption. `layers`: a table.
    `threads` are of each of the `processes`; `samples_per_second` of all.
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
    processes: int = 1
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
    A callback that may end the training says by what: plain values in its `decides`.

    Raises:
        Interrupted: a signal came; the state is saved.
        Diverged: the loss is no longer finite.
        OutOfMemory: there is too little memory, and no smaller batch is to be tried.
        UserError: the recipe does not fit the data or the device.
    """
    recipe = with_devices(recipe)
    while True:
        try:
            return _fit(recipe, data, state_folder, log, callbacks, name, brief)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            settings, reason = recipe.trainer, str(error).splitlines()[0][:200]
        # Outside the handler, where the failed step's tensors are no longer held by the exception.
        gc.collect()
        torch.cuda.empty_cache()
        outer = outer_ranks()
        if outer is not None and outer.world > 1:  # the others wait in the middle of the step that failed
            raise OutOfMemory(
                f"out of memory at batch size {settings.batch_size} ({reason}): lower trainer.batch_size; it is "
                "not halved where another launcher has started the processes"
            )
        if settings.on_out_of_memory == "fail" or settings.batch_size // 2 < least_batch(recipe):
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
    place_of(recipe)
    state = State(state_folder, recipe, data.meta.digest, _more(recipe, data, callbacks))
    for line in state.explain_others():
        print(line, file=sys.stderr)
    specification = specification_of(recipe, data.meta)
    state.open()
    tell_of_start(recipe, specification)
    with together(recipe, data, state.path, name) as ranks:
        place = place_of(recipe, ranks)
        threads = prepare_process(recipe, place[0], ranks)
        checkpoint = state.newest()
        step = _step_of(checkpoint)
        if ranks.world > 1:
            told = {"recipe": to_plain(recipe), "mean": specification.mean, "std": specification.std, "step": step}
            told_by_first(json.dumps(told).encode())
            told_by_first(checkpoint.read_bytes() if checkpoint else b"")
        engine = build(recipe, data, specification, ranks, place, name)
        keeper = Keeper(state, recipe.trainer.monitor, recipe.trainer.checkpoint_every_s)
        clock = _Clock(log)
        shown = FitProgress(recipe.trainer.batch_size, name, brief)
        trainer = trainer_of(recipe, place, [*callbacks, clock, shown, keeper], ranks)
        if checkpoint:
            engine.batches.train.begin_at(*divmod(step, engine.module.steps_per_epoch))
            print(f"going on from {checkpoint} at step {step} of {engine.module.steps}", file=sys.stderr)
        layers = layer_table(engine.whole, specification.shape)
        ready = clock.began = time.monotonic()
        trainer.fit(
            engine.module, engine.batches, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
        )
        fitting = clock.fitting()
    return Fitted(
        recipe=recipe,
        network=_best_network(engine, specification, keeper).eval(),
        state=state,
        specification=specification,
        history=keeper.history,
        best=keeper.best,
        seconds={"setup": ready - began, "fit": fitting, "train": clock.training},
        samples_per_second=clock.samples / max(clock.training, 1e-9),
        resumed_from=step,
        layers=layers,
        device=str(place[0]),
        precision=place[1],
        threads=threads,
        processes=ranks.world,
        features=engine.learnt if isinstance(engine.learnt, FeatureData) else None,
    )


def _more(recipe: Recipe, data: PackedData, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return what decides the weights besides recipe, data and code: the shards, and what may end the fit."""
    more: dict[str, Any] = {}
    if recipe.trainer.stream is not None:
        place = place_of_shards(recipe.trainer.stream)
        more["trainer.stream.index"] = index_for(place, data.meta.digests["train"], data.path).own_digest
    for callback in callbacks:
        more |= getattr(callback, "decides", {})
    return more


def _best_network(engine: Engine, specification: Specification, keeper: Keeper) -> Network:
    """Return the network with the weights of the best epoch, on the CPU."""
    whole = engine.learner is engine.whole
    kept = {name: tensor.cpu() for name, tensor in keeper.best_weights.items()}
    if whole:
        network = specification.build()
    else:
        network = engine.whole.cpu().to(memory_format=torch.contiguous_format)
        kept = {**network.state_dict(), **kept}
    network.load_state_dict(kept)
    return network


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
        self.before = self.began = 0.0
        self.samples = 0

    def fitting(self) -> float:
        """Return the seconds since the fit began, with those of the processes before an interruption."""
        return self.before + time.monotonic() - self.began

    def state_dict(self) -> dict[str, Any]:
        training = self.training + time.monotonic() - self.since
        return {"training": training, "samples": self.samples, "fitting": self.fitting()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training, self.samples = state_dict["training"], state_dict["samples"]
        self.before = state_dict["fitting"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += trainer.datamodule.train.size_of(batch_idx)  # type: ignore[attr-defined]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.training += time.monotonic() - self.since

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.since = time.monotonic()
        if self.send is not None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.send({**pl_module.measured, "train/learning_rate": rate}, trainer.global_step)


def _step_of(checkpoint: Path | None) -> int:
    """Return a checkpoint's step (0: from the start)."""
    if checkpoint is None:
        return 0
    try:
        return torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint} is no checkpoint of ours and is not loaded ({reason}): remove it") from None
