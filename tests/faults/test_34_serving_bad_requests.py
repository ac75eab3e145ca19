"""Row 34: what a client may get wrong is answered in one line that says what to send; the server lives on."""

from __future__ import annotations

import base64
import json
import re
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
import live as servers

TIMEOUT_S = 1.5
LIMITS = {
    "max_body_bytes": 200_000,
    "max_pixels": 1_000_000,
    "max_images": 8,
    "header_timeout_s": TIMEOUT_S,
    "body_timeout_s": TIMEOUT_S,
}
PIXELS = np.arange(784, dtype=np.uint8).reshape(28, 28)
PNG = servers.png(PIXELS)
TEXT = base64.b64encode(PNG).decode()
JSON = "application/json"
WHOLE = "send a whole PNG or JPEG of at most 1000000 pixels"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Live]:
    bundle = tmp_path_factory.mktemp("fault34") / "bundle"
    servers.make_bundle(bundle)
    with servers.front(bundle, **LIMITS) as live:
        yield live


@pytest.fixture(autouse=True)
def lives_on(server: servers.Live) -> Iterator[None]:
    """After every case the same process still answers a good request."""
    worker = _workers(server)
    yield
    reply = server.ask("/predict", PNG, "image/png")
    assert reply.status == 200 and len(reply.json["predictions"]) == 1
    assert _workers(server) == worker
    assert "Traceback" not in server.log.read_text()


def _workers(server: servers.Live) -> list[int]:
    import psutil

    return sorted(child.pid for child in psutil.Process(server.process.pid).children(recursive=True))


def _bomb(width: int, height: int) -> bytes:
    """Return a small PNG whose head promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _inputs(*images: Any, **parameters: Any) -> bytes:
    return json.dumps({"inputs": list(images), **({"params": parameters} if parameters else {})}).encode()


def _with(value: Any) -> list[list[Any]]:
    rows: list[list[Any]] = PIXELS.tolist()
    rows[3][4] = value
    return rows


def assert_says_what_to_send(reply: servers.Reply) -> None:
    """Check an answer: one line with a reason and, after it, what to send instead."""
    servers.assert_one_line(reply.text)
    assert re.search(r"\bsend [\w\"{]|: POST /predict, ", reply.json["error"]), reply.text


# name: body, what the line must say
JSON_CASES: dict[str, tuple[bytes, str]] = {
    "broken json": (b'{"inputs": [', "line 1, column 13"),
    "nothing but spaces": (b"   ", "line 1"),
    "not utf-8": (b'{"inputs": ["\xff\xfe"]}', "UTF-8"),
    "a list": (b'["x"]', '{"inputs": [...]}'),
    "a number": (b"3", '{"inputs": [...]}'),
    "null": (b"null", '{"inputs": [...]}'),
    "no known field": (b'{"images": []}', "images"),
    "two forms at once": (b'{"inputs": [], "instances": []}', "exactly one"),
    "neither form": (b'{"params": {"top_k": 1}}', "exactly one"),
    "deep nesting": (b'{"inputs": ' + b"[" * 90_000, "nested too deeply"),
    "huge integer": (b'{"inputs": [[[' + b"9" * 5000 + b"]]]}", "too many digits"),
    "inputs is text": (b'{"inputs": "abc"}', "list of images"),
    "wrong column": (json.dumps({"dataframe_records": [{"picture": TEXT}]}).encode(), "'picture'"),
    "wrong column of inputs": (json.dumps({"inputs": {"img": [TEXT]}}).encode(), "'img'"),
    "extra column": (json.dumps({"dataframe_records": [{"image": TEXT, "id": 1}]}).encode(), "'id'"),
    "split with wrong column": (
        json.dumps({"dataframe_split": {"columns": ["x"], "data": [[TEXT]]}}).encode(),
        "'x'",
    ),
    "split without columns": (json.dumps({"dataframe_split": {"data": [[TEXT]]}}).encode(), "columns"),
    "split with a short row": (
        json.dumps({"dataframe_split": {"columns": ["image"], "data": [[TEXT], []]}}).encode(),
        "row 1",
    ),
    "records and values mixed": (json.dumps({"inputs": [TEXT, {"image": TEXT}]}).encode(), "inputs"),
    "no rows": (_inputs(), "no images"),
    "no rows in split": (b'{"dataframe_split": {"columns": ["image"], "data": []}}', "no images"),
    "too many images": (_inputs(*[[[1]]] * 9), "at most 8"),
    "not base64": (_inputs(TEXT, "not base64!"), "row 1"),
    "empty text": (_inputs(""), "row 0"),
    "data url without base64": (_inputs("data:image/png,abc"), "data:image/png;base64"),
    "base64 of no image": (_inputs(TEXT, TEXT, base64.b64encode(b"hello").decode()), "row 2"),
    "truncated image": (_inputs(base64.b64encode(PNG[:60]).decode()), WHOLE),
    "image bomb": (_inputs(base64.b64encode(_bomb(60_000, 60_000)).decode()), WHOLE),
    "null image": (_inputs(None), "row 0"),
    "true as image": (_inputs(True), "row 0"),
    "a number as image": (_inputs(5), "row 0"),
    "NaN": (_inputs(_with(float("nan"))), "NaN"),
    "infinity": (_inputs(_with(float("inf"))), "Infinity"),
    "1e999": (b'{"inputs": [[[0.5, 1e999]]]}', "infinity"),
    "negative pixel": (_inputs(_with(-1)), "row 0"),
    "pixel of 256": (_inputs(_with(256)), "row 0"),
    "text as pixel": (_inputs(_with("7")), "row 0"),
    "null as pixel": (_inputs(_with(None)), "row 0"),
    "ragged rows": (_inputs([[1, 2], [3]]), "row 0"),
    "one-dimensional": (_inputs([1, 2, 3]), "row 0"),
    "four-dimensional": (_inputs([[[[1]]]]), "row 0"),
    "no pixels": (_inputs([[], []]), "row 0"),
    "top_k 0": (_inputs(TEXT, top_k=0), "from 1 to 10"),
    "top_k negative": (_inputs(TEXT, top_k=-3), "from 1 to 10"),
    "top_k above the classes": (_inputs(TEXT, top_k=11), "from 1 to 10"),
    "top_k fraction": (_inputs(TEXT, top_k=1.5), "from 1 to 10"),
    "top_k text": (_inputs(TEXT, top_k="3"), "from 1 to 10"),
    "top_k true": (_inputs(TEXT, top_k=True), "from 1 to 10"),
    "unknown parameter": (_inputs(TEXT, topk=3), "only parameter is top_k"),
    "params is a list": (json.dumps({"inputs": [TEXT], "params": [3]}).encode(), "only parameter is top_k"),
}


@pytest.mark.parametrize("name", JSON_CASES)
def test_bad_json_is_a_400_in_one_line(server: servers.Live, name: str) -> None:
    body, words = JSON_CASES[name]
    reply = server.ask("/invocations", body, JSON)
    assert reply.status == 400, reply.text
    assert_says_what_to_send(reply)
    assert words in reply.json["error"]


# name: path, content type, body, status, words
OTHER_CASES: dict[str, tuple[str, str | None, bytes, int, str]] = {
    "no content type": ("/predict", None, PNG, 415, "Content-Type: image/png"),
    "form content type": ("/predict", "application/x-www-form-urlencoded", PNG, 415, "Content-Type: image/png"),
    "multipart": ("/predict", "multipart/form-data; boundary=x", PNG, 415, "Content-Type: image/png"),
    "csv": ("/invocations", "text/csv", b"image\nabc", 415, "application/json"),
    "text as png": ("/predict", "image/png", b"hello", 400, f"not an image of a known format; {WHOLE}"),
    "json as png": ("/predict", "image/png", b'{"inputs": []}', 400, "not an image"),
    "png as json": ("/predict", JSON, PNG, 400, "JSON"),
    "empty body": ("/predict", "image/png", b"", 400, "empty"),
    "empty json": ("/invocations", JSON, b"", 400, "empty"),
    "truncated": ("/predict", "image/png", PNG[:70], 400, "cannot be decoded"),
    "bomb": ("/predict", "image/png", _bomb(50_000, 50_000), 400, WHOLE),
    "svg": ("/predict", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not an image"),
    "too large": ("/predict", "image/png", bytes(200_001), 413, "200000 bytes"),
    "top_k in the query": ("/predict?top_k=0", "image/png", PNG, 400, "from 1 to 10"),
    "top_k no number": ("/predict?top_k=many", "image/png", PNG, 400, "whole number"),
    "unknown in the query": ("/predict?topk=3", "image/png", PNG, 400, "send only top_k"),
    "unknown path": ("/v2/predict", "image/png", PNG, 404, "POST /predict"),
    "path traversal": ("/../../etc/passwd", "image/png", PNG, 404, "POST /predict"),
}


@pytest.mark.parametrize("name", OTHER_CASES)
def test_bad_request_is_refused_in_one_line(server: servers.Live, name: str) -> None:
    path, kind, body, status, words = OTHER_CASES[name]
    reply = server.ask(path, body, kind)
    assert reply.status == status, reply.text
    assert_says_what_to_send(reply)
    assert words in reply.json["error"]


def _together(count: int, side: int) -> bytes:
    """Return a request of pictures that are all there, `side` × `side` each."""
    return _inputs(*[base64.b64encode(servers.png(np.zeros((side, side), np.uint8))).decode()] * count)


@pytest.mark.parametrize("form", ["pictures", "bombs", "arrays"])
def test_many_images_may_hold_no_more_pixels_than_one(server: servers.Live, form: str) -> None:
    """Each is within `max_pixels`; the sum is known from their heads, before any is decoded."""
    body = {
        "pictures": _together(3, 600),
        # Their data ends early: an answer of 400 would show that one was decoded.
        "bombs": _inputs(*[base64.b64encode(_bomb(1000, 1000)[:60]).decode()] * 8),
        "arrays": _inputs([[0] * 15_000], [[0] * 15_000], _png_of(990)),
    }[form]
    reply = server.ask("/invocations", body, JSON)
    assert reply.status == 413, reply.text
    assert_says_what_to_send(reply)
    assert "pixels in all: send at most 1000000 pixels a request" in reply.json["error"]


def _png_of(side: int) -> str:
    return base64.b64encode(servers.png(np.zeros((side, side), np.uint8))).decode()


def test_many_images_within_the_limit_are_answered(server: servers.Live) -> None:
    reply = server.ask("/invocations", _together(2, 600), JSON)
    assert reply.status == 200 and len(reply.json["predictions"]) == 2


def test_one_image_over_the_limit_is_named_by_its_row(server: servers.Live) -> None:
    reply = server.ask("/invocations", _inputs(TEXT, _png_of(1100)), JSON)
    assert reply.status == 400 and "row 1: 1100×1100 pixels, more than the limit" in reply.json["error"]
    assert_says_what_to_send(reply)


def test_wrong_method(server: servers.Live) -> None:
    reply = server.ask("/predict", method="DELETE")
    assert reply.status == 405
    assert_says_what_to_send(reply)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_foreign_host_is_refused(server: servers.Live, host: str) -> None:
    reply = server.talk(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert reply is not None and reply.status == 421
    servers.assert_one_line(reply.text)
    assert "serving.allowed_hosts" in reply.text


def test_two_hosts_are_refused(server: servers.Live) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    reply = server.talk(request)
    assert reply is not None and reply.status == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8080"])
def test_own_host_is_answered(server: servers.Live, host: str) -> None:
    reply = server.talk(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert reply is not None and reply.status == 200


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def test_slow_body_is_cut_off(server: servers.Live) -> None:
    """A byte now and then keeps no request alive: the limit is on the whole body."""
    started = time.monotonic()
    reply = server.talk(HEAD + b"Content-Length: 100\r\n\r\n", *[b"x"] * 20, pause=TIMEOUT_S / 6)
    assert reply is not None and reply.status == 408
    assert "did not arrive within" in reply.text
    assert_says_what_to_send(reply)
    assert TIMEOUT_S * 0.9 < time.monotonic() - started < TIMEOUT_S + 3


def test_silent_body_is_cut_off(server: servers.Live) -> None:
    reply = server.talk(HEAD + b"Content-Length: 100\r\n\r\nabc")
    assert reply is not None and reply.status == 408
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_slow_head_is_cut_off(server: servers.Live, start: bytes) -> None:
    """Granian closes the connection without an answer: no request has arrived that one could be given to."""
    started = time.monotonic()
    reply = server.talk(start, *[b"x"] * 20 if start else [], pause=TIMEOUT_S / 6)
    assert reply is None
    assert TIMEOUT_S * 0.9 < time.monotonic() - started < TIMEOUT_S + 3


def test_many_slow_clients_do_not_keep_others_out(server: servers.Live) -> None:
    import socket

    slow = []
    for _ in range(100):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\nabc")
        slow.append(connection)
    started = time.monotonic()
    reply = server.ask("/predict", PNG, "image/png")
    assert reply.status == 200 and time.monotonic() - started < TIMEOUT_S
    for connection in slow:
        connection.settimeout(20)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


@pytest.mark.parametrize("announced", [True, False])
def test_large_upload_is_refused_while_it_comes(server: servers.Live, announced: bool) -> None:
    """With its length in the head it is refused before a byte of it is read; chunked, when it passes the limit."""
    if announced:
        reply = server.talk(HEAD + b"Content-Length: 500000000\r\n\r\n")
    else:
        piece = b"186a0\r\n" + bytes(100_000) + b"\r\n"
        reply = server.talk(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 3)
    assert reply is not None and reply.status == 413
    assert_says_what_to_send(reply)
    assert "200000 bytes" in reply.text


@pytest.mark.parametrize(
    "body", [b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", b"Content-Length: 100\r\n\r\nabc"]
)
def test_body_that_ends_early(server: servers.Live, body: bytes) -> None:
    reply = server.talk(HEAD + body, half_close=True)
    assert reply is None or reply.status == 400
    if reply is not None:
        servers.assert_one_line(reply.text)


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"],
)
def test_not_http(server: servers.Live, request_bytes: bytes) -> None:
    reply = server.talk(request_bytes)
    assert reply is None or (reply.status == 400 and "Traceback" not in reply.text)


def test_huge_head(server: servers.Live) -> None:
    reply = server.talk(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n")
    assert reply is None or reply.status == 431


def test_client_that_leaves_before_its_answer(server: servers.Live) -> None:
    import socket

    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(PNG)}\r\n\r\n".encode() + PNG)
