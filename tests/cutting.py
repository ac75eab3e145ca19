"""A way to a server that can be cut while something is sent over it."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator


class Way:
    """Passes bytes on to a port of loopback, until as many requests of one kind went over it as are allowed.

    The next of them is cut in its middle, and whoever comes after that is refused until `mend`.
    """

    def __init__(self, port: int, start: bytes, allowed: int) -> None:
        self.target, self.start, self.allowed = port, start, allowed
        self.passed, self.cut = 0, False
        self._lock = threading.Lock()
        way = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                way._pass_on(self.request)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def mend(self) -> None:
        """Let everything through from now on."""
        with self._lock:
            self.cut, self.allowed = False, 1_000_000

    def _pass_on(self, client: socket.socket) -> None:
        if self.cut:
            return
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while piece := client.recv(1 << 16):
                    if self._refuses(piece):
                        server.sendall(piece[: len(piece) // 2])
                        break
                    server.sendall(piece)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join(10)

    def _refuses(self, piece: bytes) -> bool:
        # Clients write the head of a request at once.
        with self._lock:
            if piece.startswith(self.start):
                self.cut = self.cut or self.passed >= self.allowed
                self.passed += not self.cut
            return self.cut

    @contextlib.contextmanager
    def open(self) -> Iterator[Way]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
