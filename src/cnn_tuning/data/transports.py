"""Ways to reach a source: a location and a place in the cache come in, a local file goes out.

Streams (https, S3) land in `NAME.part` and continue there after an interruption, if the source still holds
the same object.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cnn_tuning.config import SourceConfig
from cnn_tuning.data.digests import sha256_of

CONNECT_S = 3.0
READ_S = 10.0  # a server that hangs is told within 15 s
_BLOCK = 1 << 18


class SourceError(Exception):
    """A source cannot give a file; the text is the reason, one line."""


@dataclass(frozen=True)
class Reply:
    """A source's answer: `blocks` begin at byte `offset` of `total` (None: unknown)."""

    blocks: Iterator[bytes]
    offset: int
    total: int | None
    validator: str | None


Opener = Callable[[int, str | None], AbstractContextManager[Reply]]
Report = Callable[[int, int | None], None]


def download(open_at: Opener, target: Path, report: Report, max_bytes: int | None = None) -> None:
    """Stream into `target`, continuing `target.part`; a broken stream is taken up again while it advances.

    `report(done, total)` is called as bytes arrive. Raises `SourceError`.
    """
    part = target.with_name(f"{target.name}.part")
    note = target.with_name(f"{target.name}.part.json")
    while True:
        begin = part.stat().st_size if part.exists() and note.exists() else 0
        try:
            validator = json.loads(note.read_text()) if begin else None
        except ValueError:  # a damaged note: nothing says that the part is of the same file
            begin, validator = 0, None
        try:
            with open_at(begin, validator) as reply:
                if reply.offset not in (0, begin):
                    raise SourceError(f"asked from byte {begin}, got byte {reply.offset}")
                if reply.offset == 0:  # before the note, which must not stand beside bytes of another file
                    part.unlink(missing_ok=True)
                _write_note(note, reply.validator)
                _append(reply, part, report, max_bytes)
            break
        except _Interrupted as broken:
            size = part.stat().st_size if part.exists() else 0
            if size <= begin:
                raise SourceError(str(broken)) from None
    part.replace(target)
    note.unlink(missing_ok=True)


def _write_note(note: Path, validator: str | None) -> None:
    new = note.with_name(f"{note.name}.new")
    new.write_text(json.dumps(validator))
    new.replace(note)


class _Interrupted(Exception):
    """The stream broke; what arrived is kept."""


def _append(reply: Reply, part: Path, report: Report, max_bytes: int | None) -> None:
    if max_bytes is not None and reply.total is not None and reply.total > max_bytes:
        raise SourceError(f"{reply.total} bytes, expected {max_bytes}")
    done = reply.offset
    with part.open("r+b" if reply.offset else "wb") as file:
        file.seek(reply.offset)
        file.truncate()
        for block in reply.blocks:
            file.write(block)
            done += len(block)
            if max_bytes is not None and done > max_bytes:
                file.truncate(0)
                raise SourceError(f"more than the expected {max_bytes} bytes")
            report(done, reply.total)
    if reply.total is not None and done != reply.total:
        raise _Interrupted(f"connection closed after {done} of {reply.total} bytes")


def https(url: str) -> Opener:
    """Open an http(s) URL; a partial file continues by Range if ETag or Last-Modified still match."""

    @contextmanager
    def open_at(offset: int, validator: str | None) -> Iterator[Reply]:
        import httpx

        headers = {"Accept-Encoding": "identity"}
        rest = {"Range": f"bytes={offset}-", "If-Range": validator} if offset and validator else {}
        timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        try:
            with httpx.Client(timeout=timeout, follow_redirects=True) as client, ExitStack() as stack:
                answer = stack.enter_context(client.stream("GET", url, headers=headers | rest))
                if rest and answer.status_code == 416:  # nothing is left to send, or less than there is here
                    answer = stack.enter_context(client.stream("GET", url, headers=headers))
                if answer.status_code not in (200, 206):
                    raise SourceError(f"HTTP {answer.status_code} {answer.reason_phrase}")
                length = answer.headers.get("Content-Length")
                start = 0
                if answer.status_code == 206:
                    start = _range_start(answer.headers.get("Content-Range", ""))
                total = start + int(length) if length and length.isdigit() else None
                etag = answer.headers.get("ETag", "")
                # A weak tag may not stand in If-Range (RFC 9110, 13.1.5).
                again = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
                yield Reply(answer.iter_raw(), start, total, again)
        except (
            httpx.ConnectError,
            httpx.ConnectTimeout,
            httpx.UnsupportedProtocol,
            httpx.InvalidURL,
        ) as error:
            raise SourceError(_first_line(error)) from None
        except httpx.HTTPError as error:
            raise _Interrupted(_first_line(error)) from None

    return open_at


def _range_start(header: str) -> int:
    try:
        return int(header.removeprefix("bytes ").split("-")[0])
    except ValueError:
        raise SourceError(f"Content-Range {header!r} is not understood") from None


def s3(uri: str, source: SourceConfig) -> Opener:
    """Open `s3://bucket/key`; a partial file continues by Range if the ETag still matches."""
    # Not urlsplit: `#` and `?` are letters of a key like any others.
    bucket, _, key = uri.removeprefix("s3://").partition("/")

    @contextmanager
    def open_at(offset: int, validator: str | None) -> Iterator[Reply]:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, ResponseStreamingError
        from urllib3.exceptions import HTTPError

        settings = Config(
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            retries={"total_max_attempts": 1},
            **({"signature_version": UNSIGNED} if source.unsigned else {}),
        )
        wanted: dict[str, str] = {"Bucket": bucket, "Key": key}
        if offset and validator:
            wanted |= {"Range": f"bytes={offset}-", "IfMatch": validator}
        try:
            # Of its own: the default session would keep credentials that have changed since.
            client = boto3.Session().client("s3", region_name=source.region, config=settings)
            try:
                answer = client.get_object(**wanted)
            except ClientError as error:
                if "Range" not in wanted or error.response["Error"]["Code"] not in _CHANGED:
                    raise
                offset = 0
                answer = client.get_object(Bucket=wanted["Bucket"], Key=wanted["Key"])
            start = offset if "ContentRange" in answer else 0
            blocks = answer["Body"].iter_chunks(_BLOCK)
            yield Reply(blocks, start, start + answer["ContentLength"], answer.get("ETag"))
        except ClientError as error:
            detail = error.response["Error"]
            raise SourceError(f"S3 {detail.get('Code')}: {detail.get('Message') or 'refused'}") from None
        except (IncompleteReadError, ResponseStreamingError, HTTPError) as error:
            raise _Interrupted(_first_line(error)) from None
        except BotoCoreError as error:
            raise SourceError(_first_line(error)) from None

    return open_at


_CHANGED = ("PreconditionFailed", "412", "InvalidRange", "416")


def wheel(requirement: str, sha256: str | None, cache: Path) -> Path:
    """Return a pinned wheel (`name==version`) from the cache or the package index; its code is never run."""
    name, _, version = requirement.partition("==")
    if not name or not version:
        raise SourceError(f"{requirement!r} is not pinned: write wheel:name==version")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"

    def found() -> Path | None:
        return next(iter(sorted(cache.glob(pattern))), None)

    path = found()
    if path and sha256 and sha256_of(path) != sha256:
        path.unlink()
        path = None
    if path is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--timeout", "10", "--retries", "1"]
        result = subprocess.run([*command, "--dest", str(cache), requirement], capture_output=True, text=True)
        path = found()
        if result.returncode or path is None:
            lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no wheel came"]
            raise SourceError(f"pip download: {lines[-1].removeprefix('ERROR: ')}")
    if sha256 and (actual := sha256_of(path)) != sha256:
        path.unlink()
        raise SourceError(f"hash mismatch: sha256 of {path.name} is {actual}, expected {sha256}")
    return path


def package(location: str) -> Path:
    """Return the path of `import_name/path` inside an installed package, without importing it."""
    name, _, rest = location.partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"package {name!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / rest


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
