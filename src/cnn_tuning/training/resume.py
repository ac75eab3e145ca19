"""Checkpoints to go on from, under a key of (recipe, data, code, what else decides), and what interrupts a fit.

A state folder holds `recipe.json` (what it belongs to) and numbered checkpoints with their SHA-256 in
`checkpoints.json`. A checkpoint is written beside, synced and renamed; the one before is kept, so a file
cut at any byte costs at most one interval. Files are read with `weights_only`: a pickle runs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cnn_tuning.config import Recipe, flatten, to_plain

KEPT = 2
# A validation may take this long after a signal: less than a spot host's two minutes.
GRACE_S = 30.0
MANIFEST = "checkpoints.json"


class Interrupted(SystemExit):
    """The fit was asked to stop by a signal; its state is saved and the exit status is 128 + signal."""

    def __init__(self, signum: int, saved: Path | None) -> None:
        super().__init__(128 + signum)
        self.signum, self.saved = signum, saved

    def __str__(self) -> str:
        where = f"state saved in {self.saved}" if self.saved else "nothing to save yet"
        return f"{signal.Signals(self.signum).name}: {where}; the same command goes on from there"


@functools.cache
def code_digest() -> str:
    """Return the SHA-256 of the code that decides weights: networks, training, batches and augmentation.

    Not of what prepares the data: its result has a digest of its own. Of the code as the process began with it:
    a file that is edited meanwhile changes nothing in it.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    data = (f"data/{name}.py" for name in ("augment", "batches", "packed", "stream"))
    for pattern in (*data, "models/*.py", "training/*.py"):
        for file in sorted(package.glob(pattern)):
            if file.name != "progress.py":
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class State:
    """The resumable state of one fit under `folder`/`key`."""

    def __init__(self, folder: Path, recipe: Recipe, data_digest: str, more: Mapping[str, Any] = {}) -> None:
        """Name the folder; `more`: plain values that decide the weights, too."""
        self.recipe = flatten(to_plain(recipe)) | {"data": data_digest, "code": code_digest(), **more}
        key = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / key

    def explain_others(self) -> list[str]:
        """Say, for each unfinished fit of another configuration, why this one does not continue it."""
        lines = []
        for file in sorted(self.path.parent.glob("*/recipe.json")):
            if file.parent == self.path:
                continue
            try:
                theirs = json.loads(file.read_text())
            except (OSError, ValueError):
                continue  # cut by a kill or a full disk: nothing to compare with
            changed = sorted(k for k in {*theirs, *self.recipe} if theirs.get(k) != self.recipe.get(k))
            what = ", ".join(f"{k} ({_short(theirs.get(k))} → {_short(self.recipe.get(k))})" for k in changed)
            lines.append(
                f"not continuing the unfinished {file.parent}: changed {what}; starting a new run "
                "(`make clean` forgets the old one)"
            )
        return lines

    def open(self) -> None:
        """Make the folder, or raise before any work is done if it cannot be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_text(self.path / "recipe.json", json.dumps(self.recipe, indent=1, sort_keys=True))

    def write(self, checkpoint: dict[str, Any], step: int) -> Path:
        """Write one checkpoint atomically and forget all but the last two."""
        target = self.path / f"step-{step:08d}.ckpt"
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(partial)
        partial.replace(target)
        entries = [e for e in self._entries() if e["file"] != target.name]
        entries.append({"file": target.name, "step": step, "sha256": digest})
        for old in entries[:-KEPT]:
            (self.path / old["file"]).unlink(missing_ok=True)
        _write_text(self.path / MANIFEST, json.dumps(entries[-KEPT:]))
        return target

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint; one that is cut or altered is named and passed over."""
        for entry in reversed(self._entries()):
            path = self.path / entry["file"]
            if not path.is_file():
                continue
            if _sha256(path) == entry["sha256"]:
                return path
            print(f"{path} is damaged (SHA-256 differs): falling back to the one before", file=sys.stderr)
        return None

    def remove(self) -> None:
        """Forget the state: the fit is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return json.loads((self.path / MANIFEST).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []


class Keeper(pl.Callback):
    """Keeps the best weights, writes the state at intervals, and stops in good order on a signal."""

    def __init__(self, state: State, monitor: str, every_s: float) -> None:
        self.state, self.monitor, self.every_s = state, monitor, every_s
        self.best: dict[str, Any] = {}
        self.best_weights: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.signum: int | None = None
        self.signalled = 0.0
        self.last_write = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take over the signals after Lightning, which would exit 0 after a SIGTERM."""
        if not self._handlers:
            self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at intervals, and before stopping."""
        # After an epoch's last batch Lightning would resume past its validation: that waits for the epoch's end.
        if batch_idx + 1 < trainer.num_training_batches:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save at intervals, before stopping, and at the end: results may still fail to be written."""
        self._save_if_due(trainer)
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            self._save(trainer)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Let a short validation end; stop a long one: the last checkpoint stands."""
        if self.signum is not None and time.monotonic() - self.signalled > GRACE_S:
            raise Interrupted(self.signum, self.state.newest())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep this epoch's row, and its weights if it is the best so far."""
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **pl_module.measured}
        self.history.append(row)
        sign = -1 if self.monitor.endswith("loss") else 1
        # A tie goes to the later epoch under a falling learning rate: equal hits, more training.
        if not self.best or sign * row[self.monitor] >= sign * self.best[self.monitor]:
            self.best = row
            state = pl_module.measured_network.state_dict()
            self.best_weights = {name: tensor.detach().clone() for name, tensor in state.items()}

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        for signum, handler in self._handlers.items():
            # Lightning has put back those of before the fit: its own would keep the whole fit in memory.
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, handler)
        self._handlers = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what belongs into a checkpoint."""
        return {"best": self.best, "best_weights": self.best_weights, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.best, self.history = state_dict["best"], state_dict["history"]
        self.best_weights = state_dict["best_weights"]

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if self.signum is not None:
            raise Interrupted(self.signum, self._save(trainer))
        if time.monotonic() - self.last_write > self.every_s:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> Path:
        self.last_write = time.monotonic()
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        return self.state.write(checkpoint, trainer.global_step)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.signum, self.signalled = signum, time.monotonic()


def _write_text(path: Path, text: str) -> None:
    """Write a whole file or none."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:8] + "…"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
