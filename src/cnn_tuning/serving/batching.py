"""Requests' images in, their probabilities out: what arrives while the network is busy shares its next pass.

Nothing waits for company: an idle network takes a single image at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np


class Overloaded(Exception):
    """More requests wait than the queue holds."""


class Batcher:
    """Runs `compute` (N×C×H×W -> N×classes) in one thread, off the event loop; used inside a running loop."""

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], *, images: int, waiting: int) -> None:
        self.compute = compute
        self.images = images
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue(waiting)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.task = asyncio.create_task(self._work())

    async def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the rows for `images`, or raise `Overloaded` at once when the queue is full."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((images, answer))
        except asyncio.QueueFull:
            raise Overloaded from None
        return await answer

    async def close(self) -> None:
        """Stop the worker; whoever still waits is cancelled."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        while not self.queue.empty():
            self.queue.get_nowait()[1].cancel()
        self.thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            group = [await self.queue.get()]
            while not self.queue.empty() and sum(len(images) for images, _ in group) < self.images:
                group.append(self.queue.get_nowait())
            try:
                together = group[0][0] if len(group) == 1 else np.concatenate([images for images, _ in group])
                rows = await loop.run_in_executor(self.thread, self.compute, together)
            except Exception as error:
                for _, answer in group:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            start = 0
            for images, answer in group:
                if not answer.done():  # its client may have gone
                    answer.set_result(rows[start : start + len(images)])
                start += len(images)
