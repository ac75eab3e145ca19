"""Trainings that are sick on purpose, healthy ones, and data that make them so: small digits, seconds each.

A case says which rules must fire on it (`sick`), and which may as well, for they are true of it (`also`): a
network whose units are all dead has no gradients and an even loss too. All else that fires is a false alarm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cnn_tuning.config import DiagnosisConfig, ImageConfig, Recipe, compose, select
from cnn_tuning.data.packed import PackedData, PackedSplit, class_counts, digest_of
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.sources import fetch
from cnn_tuning.diagnosis.findings import Finding, rules_fired
from cnn_tuning.diagnosis.judge import diagnose, judge
from cnn_tuning.diagnosis.watch import Watch
from cnn_tuning.machine import usable_cores
from cnn_tuning.tracking.system import LOOK_EVERY_S, Sample, Sampler, read_samples
from cnn_tuning.training.fit import Diverged, fit

CONF = Path(__file__).parents[1] / "conf"

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One configuration on one kind of data, and what is done to it meanwhile: a key of `DISTURBANCES`."""

    name: str
    overrides: tuple[str, ...]
    sick: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    data: str = "digits"
    disturbance: str = ""


# Symptoms that are true of a training, whatever brought them about: nothing is learnt; bad answers; a gap between
# training and validation; units, gradients and weights where no signal comes through; a rate that breaks things.
UNLEARNT = {"loss_not_decreasing", "stalled", "underfitting"}
BAD_ANSWERS = {"low_recall", "confused_pairs"}
GAP = {"overfitting", "overtraining"}
NO_SIGNAL = {"vanishing_gradients", "dead_relus", "zero_tensors", "unchanged_weights"}
BROKEN = {"loss_spikes", "exploding_gradients", "update_ratio", "learning_rate_too_high"}

_ADAM = ("optimizer=adam", "schedule=constant", "trainer.label_smoothing=0.0")
_RATE = "optimizer.learning_rate="
_SIX = ("trainer.max_epochs=6",)
_LAB = ("model=lab_cnn", *_ADAM, f"{_RATE}0.001")


def _arguments(*values: str) -> tuple[str, ...]:
    return tuple(f"model.arguments.{value}" for value in values)


def _plain(*arguments: str, epochs: int = 5, rate: float = 0.003) -> tuple[str, ...]:
    """Return the plain network with Adam at a constant rate."""
    chosen = ("model=plain_cnn", *_ADAM, f"trainer.max_epochs={epochs}", f"{_RATE}{rate}")
    return (*chosen, *_arguments(*arguments))


def _sgd(rate: float, *overrides: str, epochs: int = 6) -> tuple[str, ...]:
    chosen = ("model=plain_cnn", "optimizer=sgd", "schedule=constant", f"{_RATE}{rate}")
    return (*chosen, f"trainer.max_epochs={epochs}", *overrides)


def _case(
    name: str,
    overrides: tuple[str, ...],
    sick: set[str],
    also: set[str] | None = None,
    data: str = "digits",
    disturbance: str = "",
) -> Case:
    return Case(name, overrides, frozenset(sick), frozenset(also or set()) - sick, data, disturbance)


SICK = (
    _case(
        "weights too large",
        _plain("initial_scale=3.0", "depth=6"),
        {"poor_initialisation", "exploding_gradients"},
        UNLEARNT | BAD_ANSWERS | GAP | {"loss_spikes", "dead_relus"},
    ),
    _case(
        "weights too small",
        _plain("initial_scale=0.1", "depth=6"),
        {"poor_initialisation"},
        UNLEARNT | NO_SIGNAL | BAD_ANSWERS,
    ),
    _case(
        "deep sigmoids",
        _plain("activation=sigmoid", "depth=8"),
        {"vanishing_gradients", "poor_initialisation", "loss_not_decreasing", "stalled"},
        {"underfitting", "saturated_activations"},
    ),
    _case(
        "gradients without end",
        _sgd(1e-6, *_arguments("initial_scale=3.0", "depth=6")),
        {"exploding_gradients", "poor_initialisation"},
        UNLEARNT | BAD_ANSWERS | GAP | {"loss_spikes", "learning_rate_too_low"},
    ),
    _case(
        "units dead from the start",
        _plain("initial_bias=-5.0"),
        {"dead_relus", "zero_tensors", "unchanged_weights", "loss_not_decreasing", "stalled"},
        {"poor_initialisation", "underfitting"},
    ),
    _case(
        "units killed by the rate",
        _plain(rate=0.3),
        {"dead_relus", "learning_rate_too_high", "stalled"},
        UNLEARNT | NO_SIGNAL | BROKEN,
    ),
    _case(
        "saturated tanh",
        _plain("activation=tanh", "initial_scale=6.0"),
        {"saturated_activations"},
        {"loss_spikes", "underfitting"} | BAD_ANSWERS | GAP,
    ),
    _case(
        "updates larger than weights",
        _sgd(3.0, *_arguments("normalisation=true")),
        {"update_ratio", "learning_rate_too_high"},
        UNLEARNT | NO_SIGNAL | BROKEN,
    ),
    _case(
        "updates next to nothing",
        _plain(rate=1e-7),
        {"update_ratio", "learning_rate_too_low", "loss_not_decreasing"},
        UNLEARNT,
    ),
    _case(
        "weights that stay",
        _plain(rate=1e-11),
        {"unchanged_weights", "update_ratio", "learning_rate_too_low", "loss_not_decreasing"},
        UNLEARNT,
    ),
    _case(
        "all weights zero",
        _plain("initial_scale=0.0"),
        {"zero_tensors", "poor_initialisation", "unchanged_weights", "loss_not_decreasing", "stalled"},
        {"dead_relus", "underfitting"},
    ),
    _case("loss not finite", _sgd(1e6), {"not_finite", "learning_rate_too_high"}, BROKEN | {"underfitting"}),
    _case(
        "rate too low",
        _plain(rate=3e-5, epochs=4),
        {"learning_rate_too_low", "underfitting"},
        UNLEARNT | BAD_ANSWERS,
    ),
    _case(
        "loss in leaps",
        _plain(rate=0.1, epochs=4),
        {"loss_spikes", "learning_rate_too_high"},
        UNLEARNT | BAD_ANSWERS | NO_SIGNAL | BROKEN | GAP,
    ),
    _case(
        "network too small",
        _plain("width=1", "depth=4", epochs=8, rate=0.01),
        {"underfitting"},
        BAD_ANSWERS | {"stalled", "poor_initialisation"},
    ),
    _case(
        "one epoch in large batches",
        (*_LAB, "trainer.max_epochs=1", "trainer.batch_size=512"),
        {"underfitting"},
        UNLEARNT | BAD_ANSWERS,
    ),
    _case(
        "few images learnt by heart",
        (*_LAB, "trainer.max_epochs=60"),
        {"overfitting"},
        GAP | BAD_ANSWERS,
        data="few",
    ),
    _case(
        "trained on and on",
        (*_LAB, "trainer.max_epochs=60"),
        {"overtraining", "overfitting"},
        BAD_ANSWERS | {"label_errors"},
        data="few and noisy",
    ),
    _case("classes unequal", _SIX, {"class_imbalance"}, BAD_ANSWERS | {"overfitting"}, data="unequal"),
    _case(
        "pixels as they are",
        _plain(),
        {"inputs_not_normalised"},
        BROKEN | GAP | BAD_ANSWERS | {"underfitting", "dead_relus"},
        data="not normalised",
    ),
    _case(
        "a class hardly seen",
        _SIX,
        {"low_recall", "class_imbalance"},
        {"confused_pairs", "overfitting"},
        data="one rare",
    ),
    _case(
        "two classes alike",
        _SIX,
        {"confused_pairs"},
        {"low_recall", "label_errors", "underfitting", "overfitting"},
        data="alike",
    ),
    _case("validation images learnt", _SIX, {"leakage"}, data="leaking"),
    _case(
        "labels wrong",
        _SIX,
        {"label_errors"},
        {"overfitting", "underfitting", "low_recall"},
        data="wrong labels",
    ),
    _case(
        "more readers than cores",
        ("trainer.data_on_device=no", f"trainer.workers={usable_cores() + 2}", "trainer.max_epochs=8"),
        {"slow_loader"},
        {"step_outliers"},
    ),
    _case("steps that wait", _SIX, {"step_outliers"}, disturbance="waits"),
    _case(
        "pictures from the disk",
        (
            *_plain("width=1", "depth=2", epochs=4),
            *("augment=none", "trainer.data_on_device=no", "trainer.workers=0", "trainer.train_eval_samples=50"),
        ),
        {"io_bottleneck", "slow_loader"},
        UNLEARNT | BAD_ANSWERS | {"step_outliers", "learning_rate_too_low", "poor_initialisation"},
        data="large pictures",
        disturbance="forgets pages",
    ),
    _case(
        "tensors kept",
        (*_plain(epochs=60), "trainer.batch_size=32"),
        {"memory_growth"},
        GAP | BAD_ANSWERS,
        disturbance="keeps tensors",
    ),
    _case(
        "compiled for seconds of training",
        (*_SIX, "trainer.compile=true"),
        {"long_initialisation"},
        {"step_outliers"},
        disturbance="compiles anew",
    ),
)

HEALTHY = (
    Case("digits", ()),
    Case("digits, half as long", _SIX),
    Case("digits, augmented, dropout", ("augment=shift", "model.dropout=both")),
    Case("lab network", (*_LAB, *_SIX)),
    Case("lab network, batch 32", (*_LAB, "trainer.max_epochs=10", "trainer.batch_size=32", "model.dropout=both")),
    Case("plain", _plain(epochs=6)),
    Case("plain, one cycle", ("model=plain_cnn", "optimizer=adamw", f"{_RATE}0.01", "trainer.max_epochs=8")),
    Case("plain, normalised", _plain("normalisation=true", epochs=10)),
    Case("plain, 8 deep", _plain("depth=8", epochs=6)),
    Case("plain, tanh", (*_plain("activation=tanh", epochs=8), "schedule=cosine")),
    Case("plain, first block frozen", _plain("frozen=1", epochs=6)),
    Case("plain, SGD", (*_sgd(0.02, epochs=8), "schedule=cosine")),
)


class Waits(Callback):
    """Stops the training now and then, as a slow disk or a busy neighbour does."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Sleep in every twentieth step."""
        if trainer.global_step % 20 == 19:
            time.sleep(0.4)


class KeepsTensors(Callback):
    """Keeps two megabytes of every step, as a list of results does that hold their graphs."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def on_train_batch_end(self, *_: object) -> None:
        """Keep some more: of memory of its own, which the system gets back at the end."""
        own = mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.kept.append(torch.frombuffer(own, dtype=torch.float32).fill_(1))

    def teardown(self, *_: object, **__: object) -> None:
        """Let go of it: the next training in this process begins as this one did."""
        self.kept.clear()


class ForgetsPages(Callback):
    """Lets the system forget the pictures' file at each step: as if it were larger than memory."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Let go of what is mapped and cached."""
        images = trainer.datamodule.train.split.images
        images._mmap.madvise(mmap.MADV_DONTNEED)
        with Path(images.filename).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class CompilesAnew(Callback):
    """Compiles without what earlier trainings left on the disk."""

    def setup(self, *_: object, **__: object) -> None:
        """Use no cache."""
        torch._inductor.config.force_disable_caches = True


DISTURBANCES: dict[str, type[Callback]] = {
    "waits": Waits,
    "keeps tensors": KeepsTensors,
    "forgets pages": ForgetsPages,
    "compiles anew": CompilesAnew,
}


class JudgesEachEpoch(Callback):
    """Asks the rules after each epoch, as a training by hand does, and keeps the names of those that fired."""

    def __init__(self, watch: Watch, fired: set[str]) -> None:
        self.watch, self.fired = watch, fired

    def on_train_epoch_end(self, *_: object) -> None:
        """Judge what there is so far."""
        self.fired.update(rules_fired(judge(self.watch.so_far(), self.watch.config)))


def recipe_of(case: Case, seed: int) -> tuple[Recipe, DiagnosisConfig]:
    """Return what a case trains by, and the rules with the thresholds that are shipped."""
    overrides = ["experiment=digits", "trainer.accelerator=cpu", *case.overrides, f"seed={seed}"]
    config = compose(overrides, params=None, conf=CONF)
    return select(Recipe, config), config.diagnosis


def train(case: Case, seed: int, folder: Path, live: set[str] | None = None) -> list[Finding]:
    """Train a case for real and return what all rules say of it; its data are made under `folder`.

    `live` gets the names of the rules that fired after any epoch.
    """
    recipe, config = recipe_of(case, seed)
    data = data_of(case.data, folder)
    watch = Watch(recipe, config, case.name, stops=False)
    state = folder / "state" / f"{case.name} {seed}"
    judges = [] if live is None else [JudgesEachEpoch(watch, live)]
    callbacks = [*watch.callbacks, *judges, *([DISTURBANCES[case.disturbance]()] if case.disturbance else [])]
    with _sampled(folder / f"{case.name} {seed}.jsonl") as samples:
        try:
            fitted = fit(recipe, data, state_folder=state, callbacks=callbacks, name=case.name, brief=True)
        except Diverged:
            recording = watch.so_far()
        else:
            recording = watch.conclude(fitted, data, samples())
    return diagnose(recording, config, recipe, data)[1]


@contextlib.contextmanager
def _sampled(path: Path) -> Iterator[Callable[[], list[Sample]]]:
    """Sample this process as a run's deliverer does, and give what was sampled so far."""
    stop = threading.Event()
    sampler = Sampler(path, {"pid": os.getpid(), "system_metrics_every_s": 1.0, "at": 1000 * time.time()})

    def sample() -> None:
        while not stop.wait(LOOK_EVERY_S):
            sampler.sample_if_due()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: read_samples(path)
    finally:
        stop.set()
        thread.join()


def data_of(kind: str, folder: Path) -> PackedData:
    """Return prepared data of a kind of `KINDS`, made unless they are there."""
    path = folder / kind.replace(" ", "_")
    if not (path / "meta.json").exists():
        if kind == "digits":
            config = compose(["experiment=digits"], params=None, conf=CONF).data
            fetch(config, folder / "raw", cache=folder / "cache")
            prepare(config, folder / "raw", path, seed=0)
        else:
            _write(path, data_of("digits", folder), *KINDS[kind])
    return PackedData.open(path)


def _write(
    path: Path, source: PackedData, change: Callable[[Splits, np.random.Generator], Splits], meta: dict[str, Any]
) -> None:
    """Write changed splits, and values of `meta.json` that are changed."""
    splits = {name: _arrays(source.split(name)) for name in ("train", "val")}
    splits = change(splits, np.random.default_rng(0))
    for name, (images, labels) in splits.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        np.save(path / name / "images.npy", images)
        np.save(path / name / "labels.npy", labels)
    classes = len(source.meta.classes)
    changed = dataclasses.replace(
        source.meta,
        counts={name: class_counts(labels, classes) for name, (_, labels) in splits.items()},
        digests={name: digest_of(images, labels) for name, (images, labels) in splits.items()},
        **meta,
    )
    (path / "meta.json").write_text(changed.to_json())


def _arrays(split: PackedSplit) -> tuple[np.ndarray, np.ndarray]:
    return np.array(split.images), np.array(split.labels)


def _unchanged(splits: Splits, random: np.random.Generator) -> Splits:
    return splits


def _few(splits: Splits, random: np.random.Generator) -> Splits:
    return {**splits, "train": _rows(splits["train"], np.arange(60))}


def _few_and_noisy(splits: Splits, random: np.random.Generator) -> Splits:
    images, labels = _rows(splits["train"], np.arange(150))
    return {**splits, "train": (images, _flipped(labels, 0.25, random))}


def _unequal(splits: Splits, random: np.random.Generator) -> Splits:
    """Of classes 0 to 4 a fortieth is kept: 29 to 1."""
    return {**splits, "train": _thinned(splits["train"], range(5), 4)}


def _one_rare(splits: Splits, random: np.random.Generator) -> Splits:
    return {**splits, "train": _thinned(splits["train"], [8], 1)}


def _alike(splits: Splits, random: np.random.Generator) -> Splits:
    """What is called 9 is a 4 in another place of the list: no network can tell them apart.

    Sixty more of them are validated on, so that what is taken for what is no chance.
    """
    splits, changed = _moved(splits, np.flatnonzero(splits["train"][1] == 4)[:60]), {}
    for name, (images, labels) in splits.items():
        fours = np.flatnonzero(labels == 4)
        labels = labels.copy()
        nines = labels == 9
        labels[fours[random.random(len(fours)) < 0.5]] = 9
        changed[name] = (images[~nines], labels[~nines])
    return changed


def _moved(splits: Splits, rows: np.ndarray) -> Splits:
    """Return splits with rows of the training split in the validation split instead."""
    train = splits["train"]
    more = zip(splits["val"], _rows(train, rows), strict=True)
    images, labels = (np.concatenate(both) for both in more)
    return {**splits, "train": _rows(train, np.delete(np.arange(len(train[1])), rows)), "val": (images, labels)}


def _leaking(splits: Splits, random: np.random.Generator) -> Splits:
    images, labels = splits["train"]
    others, others_labels = splits["val"]
    count = len(others) // 2
    merged = np.concatenate([images, others[:count]]), np.concatenate([labels, others_labels[:count]])
    return {**splits, "train": merged}


def _wrong_labels(splits: Splits, random: np.random.Generator) -> Splits:
    return {name: (images, _flipped(labels, 0.08, random)) for name, (images, labels) in splits.items()}


def _rows(split: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return split[0][rows], split[1][rows]


def _thinned(
    split: tuple[np.ndarray, np.ndarray], classes: range | list[int], kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a split with so many images of some classes."""
    rows = [np.flatnonzero(split[1] == c)[: kept if c in classes else None] for c in np.unique(split[1])]
    return _rows(split, np.sort(np.concatenate(rows)))


def _flipped(labels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    wrong = random.random(len(labels)) < share
    return np.where(wrong, (labels + random.integers(1, 10, len(labels))) % 10, labels)


def _large(splits: Splits, random: np.random.Generator) -> Splits:
    """Each pixel becomes 32 by 32: 64 KB a picture."""
    return {
        name: (images.repeat(32, axis=2).repeat(32, axis=3), labels) for name, (images, labels) in splits.items()
    }


KINDS: dict[str, tuple[Callable[[Splits, np.random.Generator], Splits], dict[str, Any]]] = {
    "few": (_few, {}),
    "few and noisy": (_few_and_noisy, {}),
    "unequal": (_unequal, {}),
    "one rare": (_one_rare, {}),
    "alike": (_alike, {}),
    "leaking": (_leaking, {}),
    "wrong labels": (_wrong_labels, {}),
    "large pictures": (_large, {"image": ImageConfig(size=(256, 256), channels=1)}),
    # The network gets 0 to 255.
    "not normalised": (_unchanged, {"mean": (0.0,), "std": (1 / 255,)}),
}
