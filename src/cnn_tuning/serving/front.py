"""The HTTP front around a model: images in (one as it is, or many in MLflow's JSON forms), labels out.

    make serve          or: cnn-tuning serve models:/mnist-classifier@champion
    curl --data-binary @digit.png -H 'Content-Type: image/png' 'http://127.0.0.1:8080/predict?top_k=3'

Granian reads the requests (it bounds heads in size and time); the limits on bodies, hosts and images are here.
Every refusal is one line of JSON that says what to send.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cnn_tuning.config import ServingConfig
from cnn_tuning.data.images import BadImage
from cnn_tuning.errors import UserError
from cnn_tuning.serving import inputs
from cnn_tuning.serving.batching import Batcher, Overloaded
from cnn_tuning.serving.predictor import Predictor

# Requests that may wait for the network or for a decoder, and bytes of bodies held at once.
WAITING = 64
HELD_BYTES = 256_000_000
# Images of different requests in one pass.
TOGETHER = 16

TYPES = "send Content-Type: image/png (or another image/...) with the picture, or application/json"
USAGE = """{name} version {version}: {classes} classes
POST /predict?top_k=3   a picture as the body, Content-Type: image/png (or another image/...)
POST /predict           {{"inputs": ["<base64>", ...], "params": {{"top_k": 3}}}}, Content-Type: application/json
POST /invocations       the same; also takes dataframe_split, dataframe_records and instances
GET  /health            name and version, once the model is loaded
"""


class Line(JSONResponse):
    """JSON in one line, with its end: a terminal shows it well."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return super().render(content) + b"\n"


class Refused(Exception):
    """A request that is answered with a 4xx or 503 and one line; `close` ends the connection after it."""

    def __init__(self, status: int, line: str, *, close: bool = False) -> None:
        super().__init__(line)
        self.status, self.line, self.close = status, line, close


@dataclass
class Front:
    """What the handlers share: the model, the limits, and what is under way."""

    predictor: Predictor
    config: ServingConfig
    name: str
    version: str
    decoders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")
    )
    batcher: Batcher | None = None
    decoding: int = 0
    held: int = 0

    async def predict(self, request: Request) -> Response:
        """Answer one POST."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        as_json = kind == "application/json"
        if not as_json and not kind.startswith("image/") and kind != "application/octet-stream":
            got = f"got Content-Type {kind[:60]!r}" if kind else "no Content-Type"
            raise Refused(415, f"{got}: {TYPES}", close=True)
        query = _top_k(request)
        body = bytearray()
        try:
            await self._read(request, body)
            images, top_k = await self._decode(bytes(body), as_json, query)
        finally:
            self.held -= len(body)
        assert self.batcher is not None
        rows = await self.batcher.probabilities(images)
        predictions = self.predictor.choose(rows, top_k)
        return Line({"predictions": [asdict(prediction) for prediction in predictions]})

    async def _read(self, request: Request, body: bytearray) -> None:
        """Fill `body` within the limits of bytes and seconds."""
        limit = self.config.max_body_bytes
        too_large = Refused(
            413, f"the body is larger than {limit} bytes: send a smaller or fewer images", close=True
        )
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    self.held += len(chunk)
                    if len(body) > limit:
                        raise too_large
                    if self.held > max(HELD_BYTES, limit):
                        raise Overloaded
        except TimeoutError:
            seconds = self.config.body_timeout_s
            raise Refused(
                408, f"the body did not arrive within {seconds:g} s: send it at once", close=True
            ) from None
        except ClientDisconnect:
            raise Refused(
                400, "the body ended early or is not as its head says: send all of it", close=True
            ) from None
        if not body:
            raise Refused(400, f"the body is empty: {TYPES}")

    async def _decode(self, body: bytes, as_json: bool, query: int | None) -> tuple[np.ndarray, int]:
        if self.decoding >= WAITING:
            raise Overloaded
        self.decoding += 1
        try:
            work = self._from_json if as_json else self._from_picture
            return await asyncio.get_running_loop().run_in_executor(self.decoders, work, body, query)
        finally:
            self.decoding -= 1

    def _from_picture(self, body: bytes, query: int | None) -> tuple[np.ndarray, int]:
        top_k = inputs.check_top_k(query, len(self.predictor.classes))
        return self.predictor.prepare(body)[None], top_k

    def _from_json(self, body: bytes, query: int | None) -> tuple[np.ndarray, int]:
        payload = _parse(body)
        values = inputs.rows_of(payload)
        parameters = payload.get("params") or {}
        if not isinstance(parameters, dict) or set(parameters) - {"top_k"}:
            raise inputs.BadRequest('params: the only parameter is top_k: send "params": {"top_k": 3}')
        top_k = inputs.check_top_k(parameters.get("top_k", query), len(self.predictor.classes))
        if len(values) > self.config.max_images:
            raise inputs.BadRequest(f"{len(values)} images: send at most {self.config.max_images} a request")
        images = self.predictor.open_all(inputs.as_images(values))
        # As much decoding as one picture may cost, not so much for each of many.
        pixels, limit = sum(image.width * image.height for image in images), self.config.max_pixels
        if pixels > limit:
            line = f"{len(images)} images of {pixels} pixels in all: send at most {limit} pixels a request"
            raise Refused(413, line)
        return self.predictor.prepare_all(images), top_k

    async def unreadable(self, request: Request, error: Exception) -> Response:
        """Answer what is wrong with a picture, and what would be right."""
        wanted = f"send a whole PNG or JPEG of at most {self.config.max_pixels} pixels"
        return _refusal(400, f"{error}; {wanted}")

    async def health(self, request: Request) -> Response:
        """Answer 200: the model is loaded before the first request is read."""
        return Line({"status": "ok", "name": self.name, "version": self.version})

    async def usage(self, request: Request) -> Response:
        """Answer with what can be asked."""
        classes = len(self.predictor.classes)
        return PlainTextResponse(USAGE.format(name=self.name, version=self.version, classes=classes))


class KnownHosts:
    """Refuses requests for other hosts: a page that rebinds its DNS name to this server gets nothing."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self.app, self.allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is for an allowed host."""
        hosts = [value.decode("latin-1") for key, value in scope.get("headers", ()) if key == b"host"]
        known = "*" in self.allowed or (len(hosts) == 1 and _without_port(hosts[0]) in self.allowed)
        if scope["type"] != "http" or known:
            await self.app(scope, receive, send)
            return
        line = f"host {', '.join(hosts)[:60]!r} is not served here: add its name to serving.allowed_hosts"
        await _refusal(421, line, close=True)(scope, receive, send)


def application(predictor: Predictor, config: ServingConfig, name: str, version: str) -> Starlette:
    """Return the ASGI application around a loaded model."""
    front = Front(predictor, config, name, version)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        front.batcher = Batcher(predictor.probabilities, images=TOGETHER, waiting=WAITING)
        yield
        await front.batcher.close()
        front.decoders.shutdown()

    routes = [
        Route("/", front.usage),
        Route("/health", front.health),
        Route("/ping", front.health),
        Route("/predict", front.predict, methods=["POST"]),
        Route("/invocations", front.predict, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(KnownHosts, allowed=config.allowed_hosts)],
        exception_handlers={
            Refused: _refused,
            BadImage: front.unreadable,
            UserError: _bad_request,
            Overloaded: _overloaded,
            HTTPException: _no_route,
            Exception: _failed,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # /predict/ is no path of this server: a line says so, like for any other
    return app


def _top_k(request: Request) -> int | None:
    """Return `?top_k=` as a number, if it is there; it may be out of range still."""
    unknown = [name for name in request.query_params if name != "top_k"]
    if unknown:
        line = f"unknown query parameter {unknown[0][:40]!r}: send only top_k"
        raise Refused(400, line, close=True)
    text = request.query_params.get("top_k")
    try:
        return None if text is None else int(text)
    except ValueError:
        raise Refused(400, f"top_k: got {text!r:.42}, send a whole number", close=True) from None


def _parse(body: bytes) -> Any:
    def refuse(name: str) -> Any:
        raise inputs.BadRequest(f"{name} is no number that a pixel can have; {inputs.WANTED}")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise inputs.BadRequest(f"the JSON is nested too deeply; {inputs.WANTED}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise inputs.BadRequest(f'the JSON is broken at {where}: send {{"inputs": ["<base64>"]}}') from None
    except UnicodeDecodeError:
        raise inputs.BadRequest('the JSON is not UTF-8 text: send {"inputs": ["<base64>"]}') from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise inputs.BadRequest(f"the JSON holds a number of too many digits; {inputs.WANTED}") from None


def _without_port(host: str) -> str:
    head, bracket, _ = host.partition("]")
    return (head + bracket if bracket else host.partition(":")[0]).lower()


def _refusal(status: int, line: str, *, close: bool = False, headers: dict[str, str] | None = None) -> Response:
    fields = {**({"connection": "close"} if close else {}), **(headers or {})}
    return Line({"error": " ".join(line.split())}, status_code=status, headers=fields)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _refusal(error.status, error.line, close=error.close)


async def _bad_request(request: Request, error: Exception) -> Response:
    return _refusal(400, str(error))


async def _overloaded(request: Request, error: Exception) -> Response:
    return _refusal(
        503, "too many requests are waiting: try again in a second", close=True, headers={"retry-after": "1"}
    )


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    line = f"{error.detail}: POST /predict, POST /invocations, GET /health or GET /"
    return _refusal(error.status_code, line, close=True, headers=dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    return _refusal(500, "the server failed on this request: its log says why")
