"""Requests to a live front: whole and damaged pictures, JSON, heads, bytes of no protocol; each has one answer.

An answer is 200, 4xx or 503 with one line; never 500, a traceback or silence while the server lives.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import socket
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live as servers
from hypothesis import strategies as st
from mutations import Target, damaged
from readers import _pictures

SECONDS = 60
PATHS = ["/predict", "/invocations", "/health", "/ping", "/", "/predict/", "//predict", "/../predict", "/%2e%2e/x"]
TYPES = [
    *("image/png", "image/jpeg", "application/json", "application/octet-stream", "text/csv", "", "image/"),
    *("application/json; charset=utf-16", "multipart/form-data; boundary=x", "IMAGE/PNG;a=b"),
]
QUERIES = ["", "?top_k=3", "?top_k=0", "?top_k=-1", "?top_k=x", "?top_k=" + "9" * 5000, "?x=1", "?%ff"]
LISTS = ["inputs", "instances", "dataframe_records"]
FORMS = [*LISTS, "dataframe_split", "params", "image", "columns", "data", "top_k"]


def _values() -> st.SearchStrategy[Any]:
    picture = st.sampled_from(_pictures()[:6]).map(lambda data: base64.b64encode(data).decode())
    pixels = st.lists(st.lists(st.integers(-1, 256), min_size=1, max_size=4), min_size=1, max_size=4)
    leaf = st.one_of(
        *(picture, pixels, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
        st.just("data:image/png;base64,AAAA"),
    )
    tree = st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FORMS), inner, min_size=1, max_size=3)
        ),
        max_leaves=8,
    )
    framed = st.dictionaries(st.sampled_from(LISTS), st.lists(tree, max_size=4))
    split = tree.map(lambda rows: {"dataframe_split": {"columns": ["image"], "data": rows}})
    return st.one_of(tree, framed, split)


def _bodies() -> st.SearchStrategy[bytes]:
    as_json = _values().map(lambda tree: json.dumps(tree).encode())
    whole = [
        json.dumps({"inputs": [base64.b64encode(_pictures()[0]).decode()], "params": {"top_k": 2}}).encode(),
        json.dumps({"dataframe_split": {"columns": ["image"], "data": [[[[0, 255], [1, 2]]]]}}).encode(),
        b'{"inputs": [[[1e999, NaN], [Infinity, 0]]]}',
        b"[" * 5000,
        b'{"inputs": [' + b"9" * 5000 + b"]}",
        '{"inputs": ["\ud800"]}'.encode("utf-8", "surrogatepass"),
    ]
    return st.one_of(as_json, damaged(whole), damaged(_pictures()), st.binary(max_size=50))


def _requests() -> st.SearchStrategy[tuple[str, str, dict[str, str], bytes]]:
    token = st.text(string.ascii_letters + "-", min_size=1, max_size=12)
    value = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
    method = st.one_of(st.just("POST"), st.just("POST"), st.sampled_from(["GET", "PUT", "HEAD", "OPTIONS", "X"]))
    head = st.dictionaries(token, value, max_size=3).flatmap(
        lambda more: st.sampled_from(TYPES).map(lambda kind: more | ({"Content-Type": kind} if kind else {}))
    )
    path = st.tuples(st.sampled_from(PATHS + PATHS[:2] * 6), st.sampled_from([*QUERIES, *[""] * 8])).map("".join)
    return st.tuples(method, path, head, _bodies())


def _ask(port: int, request: tuple[str, str, dict[str, str], bytes]) -> None:
    method, path, head, body = request
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        try:
            connection.request(method, path, body, head)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it answered before it had read all
        except ValueError:
            return  # the client itself refuses to send such a head
        answer = connection.getresponse()
        text = answer.read().decode()
        _judge(answer.status, text, method)
    except ConnectionResetError:
        pass  # as above; that the server lives is asked below
    finally:
        connection.close()
    _lives(port)


def _raw(port: int, data: bytes) -> None:
    received = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while block := connection.recv(65536):
            received += block
    if received.startswith(b"HTTP/"):
        head, _, body = received.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if b"HTTP/1.1 " not in body:  # of one request alone
            _judge(status, body.decode(), "RAW" if body else "HEAD")
    _lives(port)


def _judge(status: int, text: str, method: str) -> None:
    assert status == 200 or 400 <= status < 500 or status == 503, f"{status}: {text[:300]}"
    assert "Traceback" not in text and ".py" not in text, text[:300]
    if status != 200 and method not in ("HEAD", "RAW"):
        assert text.count("\n") == 1 and len(text) < 1000, text[:1200]
        assert json.loads(text)["error"]


def _lives(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def _wire() -> list[bytes]:
    picture = _pictures()[0]
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
    return [
        head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(picture) + picture,
        head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX: " + b"a" * 3000 + b"\r\n\r\n",
    ]


@contextlib.contextmanager
def front_targets() -> Iterator[list[Target]]:
    """Run a front around a tiny model, and give what is asked of it."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        servers.make_bundle(bundle)
        with servers.front(bundle, body_timeout_s=5.0, header_timeout_s=5.0) as live:
            yield [
                Target("front", _requests(), functools.partial(_ask, live.port), 60),
                Target("front, raw bytes", damaged(_wire()), functools.partial(_raw, live.port), 25),
            ]
            assert "Traceback" not in live.log.read_text(), live.log.read_text()[-2000:]
