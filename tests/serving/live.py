"""A tiny bundle and a real front in a process of its own, for the tests of serving and of its faults."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from project import free_port

LAUNCH = """
import json, sys
from cnn_tuning.config import ServingConfig
from cnn_tuning.errors import UserError
from cnn_tuning.serving.server import serve
try:
    serve(sys.argv[1], ServingConfig(name="test", **json.loads(sys.argv[2])))
except UserError as error:
    sys.exit(f"cnn-tuning: {error}")
"""


def make_bundle(folder: Path, *, size: int = 28, channels: int = 1, seed: int = 0) -> Any:
    """Write a seeded, hardly trained bundle; return its network in evaluation mode."""
    import torch

    from cnn_tuning.config import ImageConfig, ModelConfig
    from cnn_tuning.models import bundle

    torch.manual_seed(seed)
    name = "compact_cnn"
    specification = bundle.Specification(
        data_name="digits",
        model=ModelConfig(name=name, architecture=name, dropout="none", conv_dropout=0.0, dense_dropout=0.0),
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        image=ImageConfig(size=(size, size), channels=channels),
        mean=(0.13,) * channels,
        std=(0.31,) * channels,
    )
    network = specification.build()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    images = torch.from_numpy(noise_images(10, channels, size))
    for _ in range(12):  # enough to tell a few images apart; untrained answers are all alike
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), torch.arange(10)).backward()
        optimizer.step()
    bundle.save(folder, network, specification)
    return network.eval()


def noise_images(count: int, channels: int = 1, size: int = 28) -> np.ndarray:
    """Return different images, uint8 N×C×H×W, always the same."""
    noise = np.random.default_rng(7).integers(0, 256, (count, channels, 4, 4), dtype=np.uint8)
    return noise.repeat(size // 4, axis=2).repeat(size // 4, axis=3)


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Return an H×W or H×W×3 uint8 array as an encoded picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@dataclass
class Reply:
    """An answer as it came over the socket."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.text)


@dataclass
class Live:
    """A running server."""

    port: int
    process: subprocess.Popen
    log: Path

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        kind: str | None = None,
        *,
        method: str | None = None,
        **headers: str,
    ) -> Reply:
        """Send one request on its own connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        fields = {} if kind is None else {"Content-Type": kind}
        connection.request(method or ("GET" if body is None else "POST"), path, body, fields)
        answer = connection.getresponse()
        reply = Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode())
        connection.close()
        return reply

    def post(self, payload: Any, path: str = "/invocations") -> Reply:
        """Send JSON."""
        return self.ask(path, json.dumps(payload).encode(), "application/json")

    def talk(
        self, *chunks: bytes, pause: float = 0.0, wait: float = 20.0, half_close: bool = False
    ) -> Reply | None:
        """Send raw bytes, then read until the server closes; None: it closed without a word."""
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            try:
                for chunk in chunks:
                    connection.sendall(chunk)
                    time.sleep(pause)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                while block := connection.recv(65536):
                    received += block
            except (BrokenPipeError, ConnectionResetError):
                received += _rest(connection)
        if not received:
            return None
        head, _, text = received.decode().partition("\r\n\r\n")
        status, *lines = head.split("\r\n")
        return Reply(int(status.split()[1]), {k.lower(): v for k, v in (n.split(": ", 1) for n in lines)}, text)


def _rest(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


@contextmanager
def front(model: Path | str, **limits: Any) -> Iterator[Live]:
    """Run the front on a free port until the block ends."""
    port = free_port()
    with running([sys.executable, "-c", LAUNCH, str(model), json.dumps({"port": port, **limits})], port) as live:
        yield live


@contextmanager
def running(command: list[str], port: int, seconds: float = 90) -> Iterator[Live]:
    """Run a server until the block ends, then stop it and all its processes."""
    import torch

    # Equal bits need equal numbers of threads, and another test may have changed this process's.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        live = Live(port, process, log)
        try:
            _wait(live, seconds)
            yield live
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)


def _wait(live: Live, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and live.process.poll() is None:
        try:
            if live.ask("/ping").status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{live.log.read_text()}")


def assert_one_line(text: str) -> None:
    """Check an error's text: one line, no traceback, nothing of where the server's files are."""
    assert text.strip() and "\n" not in text.strip(), text
    assert "Traceback" not in text and 'File "' not in text, text
    places = (sys.prefix, str(Path(__file__).parents[2]), str(Path.home()), tempfile.gettempdir(), "site-packages")
    assert not [place for place in places if place in text] and not re.search(r"/\S+\.py\b", text), text


class Ahead:
    """Counts the pictures that a predictor has read, and has not answered yet."""

    def __init__(self, predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.most = self.done = 0
        prepare, probabilities = predictor.prepare, predictor.probabilities

        def counted(image: bytes) -> np.ndarray:
            self.read += 1
            self.most = max(self.most, self.read - self.done)
            return prepare(image)

        def finished(images: np.ndarray) -> np.ndarray:
            answer = probabilities(images)
            self.done += len(images)
            return answer

        monkeypatch.setattr(predictor, "prepare", counted)
        monkeypatch.setattr(predictor, "probabilities", finished)
