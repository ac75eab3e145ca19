"""What holds under too much: the front with too many clients, and a run with too many metric points.

    python bench/load.py front  [--seconds 60] [--clients 256] [--model BUNDLE]
    python bench/load.py points [--seconds 60] [--rate 10000]

front: four times as many clients as may wait (`front.WAITING`), each asking again as soon as it has its answer.
Goes out: answers by status, p50 and p99, the workers' memory, and the first answers after it. Exit status 1 where
something other than 200, 429 or 503 came, memory grew, or it did not recover.

points: a training beside a run that records points, then in turns of seconds with that and the process that
delivers them, and without both. Goes out: points recorded and points in the store (none may be lost), and what the
training lost in speed from turn to turn. Exit status 1 where a point is missing; the slowdown (target 3 %) is only
told, as it means something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from workplace import ROOT, machine, prepared

GROWTH = 1.10  # of memory from the load's first third to its last
TURN_S = 2.0
NAMES = [f"m/{number:02d}" for number in range(100)]


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("front", "points"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=int, default=10_000)
    options = parser.parse_args()
    print(machine())
    if options.what == "front":
        return front(options.seconds, options.clients)
    return points(options.seconds, options.rate)


# --- the front -------------------------------------------------------------------------------------------


def front(seconds: float, clients: int) -> int:
    """Load a front and print what came of it."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/serving")]
    import live as servers

    from cnn_tuning.serving.front import WAITING

    clients = clients or 4 * WAITING
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        servers.make_bundle(bundle)
        with servers.front(bundle) as server:
            body = _picture()
            before = asyncio.run(_clients(server.port, body, 1, 3))
            sampler = Memory(server.process.pid)
            sampler.start()
            result = asyncio.run(_clients(server.port, body, clients, seconds))
            sampler.stop()
            after = asyncio.run(_clients(server.port, body, 1, 3))
            for name, one in (("before", before), (f"{clients} clients, {seconds:g} s", result), ("after", after)):
                print(f"{name}: {one.told()}")
            early, late = sampler.thirds()
            print(f"memory of its processes: {early:.0f} MB in the first third, {late:.0f} MB in the last")
            # Its own answer first, as the file goes with the server.
            if "Traceback" in server.log.read_text():
                print(server.log.read_text()[-2000:])
    wrong = [status for status in result.answers if status not in ("200", "429", "503")]
    flat, recovered = late <= early * GROWTH + 5, set(after.answers) == {"200"}
    print("held" if not wrong and flat and recovered else f"DID NOT HOLD: {wrong} {flat=} {recovered=}")
    return int(bool(wrong) or not flat or not recovered)


def _picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Answers:
    """Answers by status (or by the error instead of one), and the seconds of those with 200."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.seconds: list[float] = []

    def told(self) -> str:
        """Return one line."""
        p50, p99 = np.percentile(self.seconds, (50, 99)) * 1000 if self.seconds else (float("nan"),) * 2
        by_status = ", ".join(f"{count:,} × {status}" for status, count in self.answers.most_common())
        return f"{by_status}; of 200: p50 {p50:.1f} ms, p99 {p99:.1f} ms"


async def _clients(port: int, body: bytes, count: int, seconds: float) -> Answers:
    answers, until = Answers(), time.monotonic() + seconds
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    await asyncio.gather(*(_client(port, request, answers, until) for _ in range(count)))
    return answers


async def _client(port: int, request: bytes, answers: Answers, until: float) -> None:
    writer = None
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            if writer is None:
                reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 60)
            writer.write(request)
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            status = head.split()[1].decode()
        except (OSError, EOFError, TimeoutError) as error:
            status, head = type(error).__name__, b"connection: close"
        answers.answers[status] += 1
        if status == "200":
            answers.seconds.append(time.monotonic() - began)
        if b"connection: close" in head and writer is not None:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()


class Memory(threading.Thread):
    """Adds up the memory of a process and its children, each second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.parent, self.megabytes, self._end = psutil.Process(pid), [], threading.Event()
        self.megabytes: list[float]

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._end.wait(1):
            every = [self.parent, *self.parent.children(recursive=True)]
            self.megabytes.append(sum(process.memory_info().rss for process in every) / 1e6)

    def stop(self) -> None:
        """End it."""
        self._end.set()
        self.join()

    def thirds(self) -> tuple[float, float]:
        """Return the medians of the first and the last third."""
        size = max(1, len(self.megabytes) // 3)
        return statistics.median(self.megabytes[:size]), statistics.median(self.megabytes[-size:])


# --- points ----------------------------------------------------------------------------------------------


def points(seconds: float, rate: int) -> int:
    """Record points beside a training for so long, then for as long in turns with nothing; count what arrived."""
    from cnn_tuning.config import TrackingConfig
    from cnn_tuning.tracking.run import Run

    training = Training()
    training.steps_per_second(min(10, seconds))  # warm
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "mlflow.db"
        config = TrackingConfig(
            name="load", experiment="load", uri=f"sqlite:///{store}", spool=f"{folder}/spool", wait_s=3600
        )
        run = Run.start(config, name="points", kind="train", params={})
        writer = Points(run, rate)
        training.steps_per_second(seconds, writer.due)
        print(f"{writer.recorded:,} points in {seconds:g} s: {writer.spent / seconds:.1%} of the training's time")
        slower = [_slower(training, writer, turn) for turn in range(max(1, round(seconds / TURN_S)))]
        began = time.monotonic()
        run.finish()
        took = time.monotonic() - began
        connection = sqlite3.connect(store)
        (arrived,) = connection.execute("SELECT count(*) FROM metrics WHERE key LIKE 'm/%'").fetchone()
        connection.close()
    lost = writer.recorded - arrived
    print(
        f"{writer.recorded:,} points recorded, {arrived:,} in the store {took:.0f} s after the end: {lost:,} lost"
    )
    low, high = np.quantile(np.random.default_rng(0).choice(slower, (10_000, len(slower))).mean(1), (0.025, 0.975))
    print(
        f"training slower by {statistics.mean(slower):.1%} (95 % interval {low:.1%} to {high:.1%}, {len(slower)} "
        f"turns of {TURN_S:g} s with and without; target 3 %)"
    )
    return int(lost != 0)


def _slower(training: Training, writer: Points, turn: int) -> float:
    """Train with points and without, which of them first by turn; return the share of the speed that they cost."""
    speeds = {}
    for recording in (True, False) if turn % 2 else (False, True):
        # What brings the points to the store takes part in the turns: it works on the same machine.
        deliverers = [] if recording else psutil.Process().children(recursive=True)
        for process in deliverers:
            process.suspend()
        if recording:
            writer.go_on()
        speeds[recording] = training.steps_per_second(TURN_S, writer.due if recording else lambda: None)
        for process in deliverers:
            process.resume()
    return 1 - speeds[True] / speeds[False]


class Points:
    """Records points as a callback does, between the steps: a hundred names a call."""

    def __init__(self, run: Any, rate: int) -> None:
        self.tracked, self.rate, self.recorded, self.spent = run, rate, 0, 0.0
        self.go_on()

    def go_on(self) -> None:
        """Record at the rate from now on."""
        self.began, self.before = time.monotonic(), self.recorded

    def due(self) -> None:
        """Record what is due by now."""
        now = time.monotonic()
        while self.recorded - self.before < (now - self.began) * self.rate:
            step = self.recorded // 100
            self.tracked.log_metrics({name: step + number / 100 for number, name in enumerate(NAMES)}, step)
            self.recorded += 100
        self.spent += time.monotonic() - now


class Training:
    """The digits experiment's network in a bare loop on one thread."""

    def __init__(self) -> None:
        import torch

        from cnn_tuning.config import Recipe, compose, select
        from cnn_tuning.data.packed import PackedData
        from cnn_tuning.models.network import build_network

        torch.set_num_threads(1)
        recipe = select(Recipe, compose(["experiment=digits"], params=None, conf=ROOT / "conf"))
        data = PackedData.open(prepared("digits") / "data/prepared")
        split, meta = data.split("train"), data.meta
        self.images, self.labels = torch.tensor(split.images), torch.tensor(split.labels)
        self.network = build_network(recipe.model, meta.shape, len(meta.classes), meta.mean, meta.std)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.size = recipe.trainer.batch_size

    def steps_per_second(self, seconds: float, after_each: Callable[[], None] = lambda: None) -> float:
        """Train for a time and return how fast it went."""
        import torch
        import torch.nn.functional as F

        began, steps = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            rows = torch.randint(len(self.labels), (self.size,))
            loss = F.cross_entropy(self.network(self.images[rows]), self.labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            after_each()
            steps += 1
        return steps / (time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
