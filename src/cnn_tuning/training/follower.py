"""A process that trains beside rank 0: `python -m cnn_tuning.training.follower`, a `Place` as JSON on its input.

It ends when its input does, so that none outlives the process that started it. What it prints goes to a log, whose
last line is told where it fails. It keeps nothing: any checkpoint is rank 0's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cnn_tuning.errors import UserError
from cnn_tuning.machine import prepare_process

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback

    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.training.ranks import Ranks

# Exit statuses: out of memory; another process of the group went first.
MEMORY, LOST = 77, 75
# One process may wait for another as long as this, say for a slow validation's callbacks.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """Where a process meets the others and which one it is; `interface`: the network's name, such as lo."""

    host: str
    port: int
    interface: str
    backend: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    data: str


def follow(ranks: Ranks, data: PackedData, callbacks: list[Callback] | None = None) -> None:
    """Train as one of a process group that is there, by rank 0's recipe and from its checkpoint.

    Raises:
        UserError: data or code differ from rank 0's; or Diverged, as in rank 0.
    """
    from cnn_tuning.config import Recipe, validate
    from cnn_tuning.training.engine import build, place_of, prepare_process, trainer_of
    from cnn_tuning.training.ranks import agree, told_by_first
    from cnn_tuning.training.start import meant

    agree(data.meta.digest)
    told = json.loads(told_by_first())
    checkpoint = told_by_first()
    recipe = validate(Recipe, told["recipe"])
    place = place_of(recipe, ranks)
    prepare_process(recipe, place[0], ranks)
    # Rank 0 knows the pretrained weights, and with them what pixels they are used to.
    specification = replace(meant(recipe, data.meta), mean=tuple(told["mean"]), std=tuple(told["std"]))
    engine = build(recipe, data, specification, ranks, place, f"rank {ranks.rank}")
    trainer = trainer_of(recipe, place, callbacks or [], ranks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank-0.ckpt"
        if checkpoint:
            path.write_bytes(checkpoint)
            del checkpoint
            engine.batches.train.begin_at(*divmod(told["step"], engine.module.steps_per_epoch))
        trainer.fit(
            engine.module, engine.batches, ckpt_path=str(path) if path.exists() else None, weights_only=True
        )


def meet(place: Place, store: Any = None) -> Ranks:
    """Join the process group of all; `store`: rank 0's own."""
    import torch.distributed as dist

    from cnn_tuning.training.ranks import Ranks

    if store is None:
        store = dist.TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=PATIENCE)
        store.add(ARRIVED, 1)
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = place.interface
    try:
        dist.init_process_group(
            place.backend, store=store, rank=place.rank, world_size=place.world, timeout=PATIENCE
        )
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before
    return Ranks(place.rank, place.world, place.local_rank, place.local_world)


# A key of the store: how many processes have come.
ARRIVED = "arrived"


def main() -> None:
    """Follow as the input says."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # who started it decides when it ends
        signal.signal(signum, signal.SIG_IGN)
    prepare_process()
    place = Place(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_input, daemon=True).start()
    status = _followed(place)
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(status)


def _followed(place: Place) -> int:
    """Follow, print the error if there is one, and return the exit status."""
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.training.memory import is_out_of_memory
    from cnn_tuning.training.ranks import is_lost

    try:
        data = PackedData.open(Path(place.data))
        follow(meet(place), data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            print(f"out of memory: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            return MEMORY
        if is_lost(error):
            print(f"another process is gone: {str(error).splitlines()[0]}", file=sys.stderr)
            return LOST
        traceback.print_exc()
        return 1
    return 0


def _end_with_input() -> None:
    """Leave at once when whoever started this process closes its input or is gone."""
    while os.read(0, 1):
        pass
    _leave(0)


def _leave(status: int) -> NoReturn:
    """Exit at once, but for the cache of shards.

    Threads of a process group whose other ends are gone may abort an ordinary exit, and hide the status.
    """
    try:
        if (stream := sys.modules.get("cnn_tuning.data.stream")) is not None:
            stream.forget()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
