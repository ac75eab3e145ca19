"""A stand-in for the instance metadata service, as IMDSv2: no token, no answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from seaweed import KEY, SECRET

TOKEN = "a-session-token"
BASE = "/latest/meta-data/"


class Imds:
    """The service; `notice()` lets it say that the host is taken away; `told_at`: when it first was read."""

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.asked: list[str] = []
        self.notice_at: datetime | None = None
        self.told_at: datetime | None = None
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer(200, TOKEN) if asked else self.answer(400, "")

            def do_GET(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                    return self.answer(401, "")
                service.asked.append(self.path)
                return self.answer(*service.says(self.path.removeprefix(BASE)))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(address, Handler)
        self.server.daemon_threads = True
        self.url = f"http://{address[0]}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def says(self, path: str) -> tuple[int, str]:
        """Return status and text of a path."""
        now = datetime.now(UTC)
        texts: dict[str, Any] = {
            "instance-id": "i-0123456789abcdef0",
            "instance-type": "g5.xlarge",
            "iam/security-credentials/": "role",
            "iam/security-credentials/role": {
                "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": KEY, "SecretAccessKey": SECRET, "Token": "",
                "LastUpdated": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                "Expiration": f"{now + timedelta(hours=6):%Y-%m-%dT%H:%M:%SZ}",
            },
        }  # fmt: skip
        if self.notice_at:
            texts["spot/instance-action"] = {"action": "terminate", "time": f"{self.notice_at:%Y-%m-%dT%H:%M:%SZ}"}
            self.told_at = self.told_at or (now if path == "spot/instance-action" else None)
        if path not in texts:
            return 404, "not found"
        return 200, texts[path] if isinstance(texts[path], str) else json.dumps(texts[path])

    def notice(self) -> None:
        """Say from now on that EC2 takes the host away in two minutes."""
        self.notice_at = datetime.now(UTC) + timedelta(seconds=120)

    def was_asked_for_notice(self) -> bool:
        """Say whether anyone has looked for the notice."""
        return f"{BASE}spot/instance-action" in self.asked

    def stop(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def imds() -> Iterator[Imds]:
    """A running metadata service."""
    service = Imds()
    yield service
    service.stop()


class Silent:
    """A service that takes connections and never answers."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # the end: it is closed
            while True:
                self.connections.append(self.listening.accept()[0])

    def stop(self) -> None:
        """End it."""
        self.listening.shutdown(socket.SHUT_RDWR)  # close alone would leave the thread in accept()
        for one in (self.listening, *self.connections):
            one.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    """A running service that is silent."""
    service = Silent()
    yield service
    service.stop()
