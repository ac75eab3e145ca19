"""A front in a process of its own while a block runs: a model's folder in, its address out."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.errors import UserError

START_S = 90.0


@dataclass(frozen=True)
class Front:
    """A running front: its address, and the seconds from the command to its first answer."""

    url: str
    seconds: float

    def ask(self, picture: Any, top_k: int = 3) -> dict[str, Any]:
        """Return the front's answer to a picture (H×W or H×W×3, uint8), sent as PNG."""
        import httpx
        from PIL import Image

        body = io.BytesIO()
        Image.fromarray(picture).save(body, "png")
        headers = {"Content-Type": "image/png"}
        where = f"{self.url}/predict?top_k={top_k}"
        answer = httpx.post(where, content=body.getvalue(), headers=headers, trust_env=False)
        answer.raise_for_status()
        return dict(answer.json())


@contextmanager
def running(model: Path, log: Path) -> Iterator[Front]:
    """Run `cnn-tuning serve` on any free port until the block ends; what it prints goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began, url = time.monotonic(), f"http://127.0.0.1:{port}"
    command = Path(sys.executable).with_name("cnn-tuning"), "serve", "--model", model
    settings = (f"serving.port={port}", "serving.workers=1")
    with log.open("w") as lines:
        process = subprocess.Popen([*command, *settings], stdout=lines, stderr=subprocess.STDOUT)
    try:
        _wait_for(url, process, log)
        yield Front(url, time.monotonic() - began)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=1, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the front does not answer: {last}")
        time.sleep(0.1)
