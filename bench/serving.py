"""Latency and throughput of `cnn-tuning serve` against stock `mlflow models serve`, same model, one run.

    python bench/serving.py                 a random network of conf/model/compact_cnn's kind
    python bench/serving.py models:/mnist-classifier@champion

Each server runs alone, with one worker. The client keeps its connections open and does as little as a client
can: it writes a prepared request and reads the answer. Goes out: a table of p50 and p99 (ms) and requests/s
for 1, 4 and 16 clients, and the ratios.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CLIENTS = (1, 4, 16)
REQUESTS = 1500
WARM = 100

OURS = """
import sys
from cnn_tuning.config import ServingConfig
from cnn_tuning.serving.server import serve
serve(sys.argv[1], ServingConfig(name="bench", port=int(sys.argv[2])))
"""


def main() -> None:
    """Measure both servers and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        model = _model(Path(scratch), sys.argv[1:])
        picture = _picture()
        text = json.dumps({"inputs": [base64.b64encode(picture).decode()]}).encode()
        bare = shutil.which("mlflow", path=str(Path(sys.executable).parent)) or "mlflow"
        rows = []
        with _server([sys.executable, "-c", OURS, str(model)], stock=False) as port:
            rows += [("ours, PNG body", *_load(port, "/predict", "image/png", picture, n)) for n in CLIENTS]
            rows += [("ours, JSON", *_load(port, "/invocations", "application/json", text, n)) for n in CLIENTS]
        with _server([bare, "models", "serve", "-m", str(model), "--env-manager", "local"], stock=True) as port:
            rows += [("stock, JSON", *_load(port, "/invocations", "application/json", text, n)) for n in CLIENTS]
    _print(rows)


def _model(scratch: Path, arguments: list[str]) -> Path:
    """Return the folder of the MLflow model to serve."""
    if arguments:
        import mlflow

        return Path(mlflow.artifacts.download_artifacts(arguments[0], dst_path=str(scratch / "model")))
    import torch

    from cnn_tuning.config import ImageConfig, ModelConfig
    from cnn_tuning.models import bundle
    from cnn_tuning.serving import pyfunc

    torch.manual_seed(0)
    name = "compact_cnn"
    model = ModelConfig(name=name, architecture=name, dropout="none", conv_dropout=0.0, dense_dropout=0.0)
    specification = bundle.Specification(
        data_name="mnist",
        model=model,
        classes=tuple("0123456789"),
        image=ImageConfig(size=(28, 28), channels=1),
        mean=(0.13,),
        std=(0.31,),
    )
    bundle.save(scratch / "bundle", specification.build(), specification)
    pyfunc.save(scratch / "bundle", scratch / "model", np.zeros((1, 28, 28), np.uint8))
    return scratch / "model"


def _picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _server(command: list[str], *, stock: bool) -> Iterator[int]:
    """Run a server on a free port until the block ends; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--port", str(port), "--workers", "1"] if stock else [*command, str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            _wait(port, process)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def _wait(port: int, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("a server did not start")


def _load(port: int, path: str, kind: str, body: bytes, clients: int) -> tuple[int, float, float, float]:
    """Return clients, p50 and p99 in ms, requests/s."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}"
    request = head.encode() + b"\r\n\r\n" + body
    asyncio.run(_clients(port, request, clients, WARM))
    started = time.perf_counter()
    seconds = asyncio.run(_clients(port, request, clients, REQUESTS))
    rate = len(seconds) / (time.perf_counter() - started)
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return clients, p50, p99, rate


async def _clients(port: int, request: bytes, clients: int, total: int) -> list[float]:
    results = await asyncio.gather(*(_client(port, request, total // clients) for _ in range(clients)))
    return [seconds for result in results for seconds in result]


async def _client(port: int, request: bytes, count: int) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(length)
        seconds.append(time.perf_counter() - started)
        if b" 200 " not in head[:20]:
            raise SystemExit(f"the server answered {head[:40]!r} {answer[:200]!r}")
    writer.close()
    return seconds


def _print(rows: list[tuple[str, int, float, float, float]]) -> None:
    stock = {clients: row for name, clients, *row in rows if name.startswith("stock")}
    print(f"{'server':<16}{'clients':>8}{'p50 ms':>9}{'p99 ms':>9}{'req/s':>9}   stock÷ours p50, ours÷stock req/s")
    for name, clients, p50, p99, rate in rows:
        ratios = f"{stock[clients][0] / p50:.1f}×, {rate / stock[clients][2]:.1f}×"
        print(f"{name:<16}{clients:>8}{p50:>9.2f}{p99:>9.2f}{rate:>9.0f}   {ratios}")


if __name__ == "__main__":
    main()
