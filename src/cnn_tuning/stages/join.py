"""The command `cnn-tuning join`: this machine's processes take part in a training that another machine leads."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cnn_tuning.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from cnn_tuning.training.together import Followers

LOOK_S = 0.2


def join(master: str, node_rank: int, data: Path, wait_s: float) -> None:
    """Start this machine's followers of the training at `master` (HOST:PORT) and wait for their end.

    Raises:
        UserError: nobody leads there, the place is not one of the plan's, or a follower failed.
    """
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--master {master!r}: write HOST:PORT, as the leading machine says")
    address = _reach(host, int(port), wait_s)

    import torch.distributed as dist

    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.training.follower import Place
    from cnn_tuning.training.together import GONE, PLAN, Followers, interface_of

    prepared = PackedData.open(data)
    store = dist.TCPStore(
        host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(wait_s, 1))
    )
    plan = Place(**json.loads(store.get(PLAN)))
    nodes = plan.world // plan.local_world
    if not 0 < node_rank < nodes:
        raise UserError(f"--node-rank {node_rank}: the training has {nodes} machines, so 1 to {nodes - 1}")
    here = replace(
        plan, host=host, port=int(port), interface=interface_of(address), data=str(prepared.path.resolve())
    )
    with tempfile.TemporaryDirectory(prefix="cnn-tuning-join-") as folder:
        followers = Followers(Path(folder))
        try:
            for place in range(plan.local_world):
                rank = node_rank * plan.local_world + place
                followers.start(replace(here, rank=rank, local_rank=place))
            print(f"node {node_rank} of {nodes}: {plan.local_world} processes follow {master}", file=sys.stderr)
            word = _wait(followers)
            if word is not None:
                _leave_word(store, GONE, f"node {node_rank}: {word}")
                raise UserError(word)
        finally:
            followers.end()
    print(f"node {node_rank}: the training has ended", file=sys.stderr)


def _reach(host: str, port: int, wait_s: float) -> str:
    """Wait until somebody listens there; return this machine's address on the way to it."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"{host}:{port} does not answer ({error}): start the training there") from None
            time.sleep(LOOK_S)


def _wait(followers: Followers) -> str | None:
    """Return how the first that failed has ended; None when all have ended well."""
    while True:
        gone = followers.first_gone()
        if gone is not None and gone.process.returncode != 0:
            return gone.fate()
        if all(one.process.poll() is not None for one in followers.all):
            return None
        time.sleep(LOOK_S)


def _leave_word(store: TCPStore, key: str, word: str) -> None:
    with contextlib.suppress(RuntimeError):  # the leading machine may be gone
        store.set(key, word)
