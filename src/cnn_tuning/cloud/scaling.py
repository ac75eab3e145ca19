"""What several machines would make of a training: one machine's speed and a link in, time and dollars out. Pure.

The global batch stays as it is, so n machines each compute an n-th of it and then sum their gradients around a
ring (Patarasuk and Yuan 2009): 2(n−1)/n of their bytes over each link, in 2(n−1) turns. That some of it happens
while they compute is left out: the prediction is on the slow side.
"""

from __future__ import annotations

from dataclasses import dataclass

# From one machine to another in the same zone and back up through gloo or NCCL: an estimate.
LATENCY_S = 100e-6
BUCKET_BYTES = 25 * 2**20  # DDP's own: gradients are summed in parts of at most so many bytes
GRADIENT_BYTES = 4  # of a weight; mixed precision keeps float32, too


@dataclass(frozen=True)
class Link:
    """Bytes per second between two processes, and the seconds that the smallest message takes."""

    bytes_per_s: float
    latency_s: float = LATENCY_S

    @classmethod
    def of_gbit(cls, gbit_per_s: float) -> Link:
        """Return the link of a network of so many gigabits per second."""
        return cls(gbit_per_s * 1e9 / 8)


@dataclass(frozen=True)
class Work:
    """One machine's training: batches of `batch` images, `images` in all epochs, `gradient_bytes` a step."""

    batch: int
    images: int
    samples_per_second: float
    gradient_bytes: int


@dataclass(frozen=True)
class Scaled:
    """What `nodes` machines would make of it; `usd` for all of them, None where the price is not known."""

    nodes: int
    step_s: float
    exchange_s: float
    samples_per_second: float
    efficiency: float
    hours: float
    usd: float | None


def exchange_seconds(gradient_bytes: int, nodes: int, link: Link) -> float:
    """Return how long n processes take to sum their gradients, and beside them the loss, once."""
    if nodes == 1:
        return 0.0
    sums = -(-gradient_bytes // BUCKET_BYTES) + 1
    volume = 2 * (nodes - 1) / nodes * gradient_bytes
    return volume / link.bytes_per_s + sums * 2 * (nodes - 1) * link.latency_s


def predict(
    work: Work, nodes: int, link: Link, *, setup_hours: float = 0.0, usd_per_hour: float | None = None
) -> Scaled:
    """Return what `nodes` machines make of the work; `usd_per_hour` and `setup_hours` are of each."""
    alone_s = work.batch / work.samples_per_second
    exchange_s = exchange_seconds(work.gradient_bytes, nodes, link)
    step_s = alone_s / nodes + exchange_s
    rate = work.batch / step_s
    hours = work.images / rate / 3600 + setup_hours
    return Scaled(
        nodes=nodes,
        step_s=step_s,
        exchange_s=exchange_s,
        samples_per_second=rate,
        efficiency=alone_s / (nodes * step_s),
        hours=hours,
        usd=None if usd_per_hour is None else usd_per_hour * hours * nodes,
    )
