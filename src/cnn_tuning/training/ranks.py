"""One of the processes that train together: which it is, Lightning's view of it, and what all tell each other.

Rank 0 is the process that called `fit`: tracking, callbacks, checkpoints and signals are its own. The others
follow it (`follower`). What they exchange here is bytes and JSON, never pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy

from cnn_tuning.config import Recipe, patch
from cnn_tuning.data.batches import Share
from cnn_tuning.errors import UserError
from cnn_tuning.training.resume import code_digest

_DIGESTS = 256  # bytes, of which the digests of one process are the first


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes in all, `local_rank` of `local_world` on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def share(self) -> Share:
        """Return what it has of each batch."""
        return Share(self.rank, self.world)


ALONE = Ranks()


def with_devices(recipe: Recipe) -> Recipe:
    """Return the recipe with a number in place of `trainer.devices: auto`: it is part of what is repeated."""
    if recipe.trainer.devices != "auto":
        return recipe
    on_gpu = recipe.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return patch(recipe, {"trainer.devices": torch.cuda.device_count() if on_gpu else 1})


def world_of(recipe: Recipe) -> int:
    """Return how many processes train by a recipe whose `devices` are a number."""
    assert isinstance(recipe.trainer.devices, int)
    return recipe.trainer.devices * recipe.trainer.num_nodes


def least_batch(recipe: Recipe) -> int:
    """Return how small a batch may be: of several processes each normalises by two images at least."""
    world = world_of(recipe)
    return 1 if world == 1 else 2 * world


def outer_ranks() -> Ranks | None:
    """Return this process's place where another launcher (torchrun, Ray Train) has started all of them.

    Known by an initialised process group, or by RANK and WORLD_SIZE in the environment.
    """
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), *local)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *local)
    return None


def agree(data_digest: str) -> None:
    """Compare data and code of all processes; raises the same `UserError` in each where one has others."""
    agree_on({"data/prepared": data_digest, "the code": code_digest()})


def agree_on(own: Mapping[str, str]) -> None:
    """Compare digests of all processes, by what they are of; raises as `agree`."""
    text = json.dumps(own).encode().ljust(_DIGESTS)
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(_exchanged_on())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    first, *others = [json.loads(bytes(tensor.cpu().numpy())) for tensor in theirs]
    for rank, other in enumerate(others, start=1):
        for what, digest in first.items():
            if other[what] != digest:
                raise UserError(
                    f"{what} of rank {rank} differs from that of rank 0 ({other[what][:12]} and {digest[:12]}): "
                    "all machines need the same prepared data, shards and version of the code"
                )


def told_by_first(content: bytes | None = None) -> bytes:
    """Return rank 0's `content` in every process; the others pass none."""
    device = _exchanged_on()
    length = torch.tensor(len(content or b""), device=device)
    dist.broadcast(length, 0)
    given = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    )
    sent = given.to(device) if dist.get_rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(sent, 0)
    return sent.cpu().numpy().tobytes()


def _exchanged_on() -> torch.device:
    """Return on which device the process group exchanges what is not training: NCCL alone has only GPUs."""
    return torch.device("cpu" if "cpu:gloo" in dist.get_backend_config() else "cuda")


def is_lost(error: BaseException) -> bool:
    """Tell whether an error means that another process of the group is gone."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


class Beside(DDPStrategy):
    """Lightning's data parallel training in a process group that is there, on the device that was chosen for it.

    Buffers are not sent before each step: running statistics decide nothing while a network learns, and before
    they are used rank 0's are taken (`Classifier.on_validation_epoch_start`).
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        super().__init__(
            cluster_environment=_Environment(ranks),
            process_group_backend=dist.get_backend(),
            broadcast_buffers=False,
        )
        self.device = device

    @property
    def root_device(self) -> torch.device:
        """Return the device of this process."""
        return self.device

    def _configure_launcher(self) -> None:
        """Have none: the processes are there, and Lightning's would set the number of threads anew."""

    def barrier(self, *_: Any, **__: Any) -> None:
        """Wait for all."""
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1, device=_exchanged_on()))

    def wrap_again(self) -> None:
        """Take in what has come to learn, or ceased to, since the network was wrapped."""
        assert self.lightning_module is not None
        self.model = self.lightning_module
        self.configure_ddp()


class _Environment(ClusterEnvironment):
    """Tells Lightning that the processes are there, and which one this is."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # never asked for: the process group is there

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.ranks.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.ranks.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.ranks.local_rank

    def node_rank(self) -> int:
        return self.ranks.rank // self.ranks.local_world
