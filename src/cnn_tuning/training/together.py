"""Rank 0's side of training together: recipe and data in, a group of processes around one fit out.

The others of this machine are started as `python -m cnn_tuning.training.follower`; other machines add theirs by
`cnn-tuning join`. A process that another launcher has started (torchrun, Ray Train) starts none.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from cnn_tuning.config import Recipe
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import CutOff, UserError
from cnn_tuning.processes import how_ended, last_words, start
from cnn_tuning.training.features import uses_cache
from cnn_tuning.training.follower import ARRIVED, LOST, MEMORY, PATIENCE, Place, meet
from cnn_tuning.training.ranks import ALONE, Ranks, agree, is_lost, least_batch, outer_ranks, world_of
from cnn_tuning.training.start import say_once

COMMAND = [sys.executable, "-P", "-m", "cnn_tuning.training.follower"]
PORT = 29500  # torch's own default
LEAVE_S = 10.0
LOOK_S = 5.0
# Keys of the store, for machines that join.
PLAN, GONE = "plan", "gone"


@dataclass
class Follower:
    """One process and the file that it prints to."""

    process: subprocess.Popen[bytes]
    rank: int
    log: Path

    def fate(self) -> str:
        """Return in a few words how it ended."""
        return f"rank {self.rank} {how_ended(self.process.returncode)} ({last_words(self.log)})"


class Followers:
    """The processes of one machine that follow rank 0; with the file that each prints to in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Follower] = []

    def start(self, place: Place) -> None:
        """Start one; a Ctrl-C in the terminal is rank 0's affair."""
        log = self.folder / f"rank-{place.rank}.log"
        process = start(COMMAND, asdict(place), log, keep_input=True)
        self.all.append(Follower(process, place.rank, log))

    def first_gone(self) -> Follower | None:
        """Return the one that ended first, rather than one that ended because of it."""
        gone = [one for one in self.all if one.process.poll() is not None]
        return next((one for one in gone if one.process.returncode != LOST), None) or next(iter(gone), None)

    def end(self) -> None:
        """Let all go; those that stay are killed with what they have started."""
        for one in self.all:
            assert one.process.stdin is not None
            with suppress(BrokenPipeError):
                one.process.stdin.close()
        deadline = time.monotonic() + LEAVE_S
        for one in self.all:
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
        self.all = []


@contextmanager
def together(recipe: Recipe, data: PackedData, folder: Path, name: str) -> Iterator[Ranks]:
    """Give this process's place among those that train by the recipe; they end with the block.

    `folder`: existing, for what the others print.

    Raises:
        UserError: another process failed, or is not like this one.
        MemoryError: another ran out of memory.
    """
    outer = outer_ranks()
    if outer is not None:
        _check_outer(outer, recipe)
    if world_of(recipe) == 1:
        yield ALONE
        return
    if uses_cache(recipe):
        say_once(f"{name}: a head on features that are computed once is trained by one process")
        yield ALONE
        return
    _check_batches(recipe, data)
    if outer is not None:
        yield _with_outer(outer, recipe, data)
        return
    followers = Followers(folder)
    store: dist.TCPStore | None = None
    try:
        host, port, own = _address(recipe)
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=PATIENCE, master_listen_fd=own.detach()
        )
        place = _first_place(recipe, host, port, data)
        store.set(PLAN, json.dumps(asdict(place)))
        for rank in range(1, place.local_world):
            followers.start(replace(place, rank=rank, local_rank=rank))
        _await(store, followers, place, name)
        ranks = meet(place, store)
        agree(data.meta.digest)
        yield ranks
    except RuntimeError as error:
        if is_lost(error) and store is not None:
            raise _reason(followers, store, error) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        followers.end()


def _check_outer(outer: Ranks, recipe: Recipe) -> None:
    """Raise `UserError` where each of the launcher's processes would train alone, or wait for one that does."""
    if outer.world != world_of(recipe):
        raise UserError(
            f"another launcher has started {outer.world} processes, but trainer.devices × trainer.num_nodes is "
            f"{world_of(recipe)}: make them equal"
        )
    if outer.world > 1:
        check_takes_several(recipe)


def check_takes_several(recipe: Recipe) -> None:
    """Raise `UserError` for a recipe that one process trains, whatever its number of devices."""
    if uses_cache(recipe):
        raise UserError(
            "a head on features that are computed once is trained by one process: start it without a launcher, or "
            "set trainer.finetune.cache_features: no"
        )


def _with_outer(outer: Ranks, recipe: Recipe, data: PackedData) -> Ranks:
    if outer.rank > 0:
        raise UserError(f"rank {outer.rank}: only rank 0 calls fit; the others call training.follower.follow")
    if not dist.is_initialized():
        dist.init_process_group(_backend(recipe), timeout=PATIENCE)
    agree(data.meta.digest)
    return outer


def _check_batches(recipe: Recipe, data: PackedData) -> None:
    largest = min(recipe.trainer.batch_size, sum(data.meta.counts["train"]) // recipe.trainer.sequential_parts)
    if largest < least_batch(recipe):
        raise UserError(
            f"batches of {largest} images give some of {world_of(recipe)} processes fewer than two: "
            "raise trainer.batch_size or lower trainer.devices"
        )


def _backend(recipe: Recipe) -> str:
    on_gpu = recipe.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu and torch.cuda.device_count() < int(recipe.trainer.devices):
        raise UserError(
            f"trainer.devices: {recipe.trainer.devices}, but there are {torch.cuda.device_count()} GPUs here"
        )
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def _address(recipe: Recipe) -> tuple[str, int, socket.socket]:
    """Return where the others come to and the socket that listens: loopback unless some are on other machines."""
    host, port = "127.0.0.1", 0
    if recipe.trainer.num_nodes > 1:
        host = os.environ.get("MASTER_ADDR") or socket.gethostbyname(socket.gethostname())
        port = int(os.environ.get("MASTER_PORT", PORT))
    try:
        own = socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}): MASTER_ADDR must be an address of this machine, "
            "MASTER_PORT a free port"
        ) from None
    return host, own.getsockname()[1], own


def _first_place(recipe: Recipe, host: str, port: int, data: PackedData) -> Place:
    devices = int(recipe.trainer.devices)
    return Place(
        host=host,
        port=port,
        interface=interface_of(socket.gethostbyname(host)),
        backend=_backend(recipe),
        rank=0,
        world=world_of(recipe),
        local_rank=0,
        local_world=devices,
        data=str(data.path.resolve()),
    )


def interface_of(address: str) -> str:
    """Return the name of the network interface with an address, such as lo."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise UserError(f"no network interface of this machine has the address {address}")


def _await(store: dist.TCPStore, followers: Followers, place: Place, name: str) -> None:
    """Wait until all have come; raises `UserError` when one of this machine has died."""
    told = place.local_world == place.world
    while True:
        missing = place.world - 1 - store.add(ARRIVED, 0)
        if missing <= 0:
            return
        if (gone := followers.first_gone()) is not None:
            raise UserError(f"{gone.fate()}, before the training began")
        if (word := _word_of_nodes(store)) is not None:
            raise UserError(word)
        if not told:
            nodes = place.world // place.local_world - 1
            print(
                f"{name}: waiting for {nodes} more machine{'s' if nodes > 1 else ''}; on each run "
                f"`cnn-tuning join --master {place.host}:{place.port} --node-rank K`, K from 1",
                file=sys.stderr,
            )
            told = True
        time.sleep(0.05)


def _word_of_nodes(store: dist.TCPStore) -> str | None:
    return store.get(GONE).decode() if store.check([GONE]) else None


def _reason(followers: Followers, store: dist.TCPStore, error: RuntimeError) -> Exception:
    """Return what to raise where the others could not be reached: why the first of them is gone."""
    deadline = time.monotonic() + LOOK_S
    while time.monotonic() < deadline:
        gone = followers.first_gone()
        if gone is not None and gone.process.returncode == MEMORY:
            return MemoryError(f"rank {gone.rank}: {last_words(gone.log)}")
        if gone is not None and gone.process.returncode != LOST:
            return CutOff(f"{gone.fate()}; the same command goes on from the last checkpoint")
        if (word := _word_of_nodes(store)) is not None:
            return CutOff(f"{word}; the same command goes on from the last checkpoint")
        time.sleep(0.1)
    return CutOff(
        f"another process of the training is gone ({str(error).splitlines()[0]}); the same command goes on from "
        "the last checkpoint"
    )
