"""A folder in S3: `s3://bucket/prefix/` comes in, its objects go out as files of a local folder, sizes checked.

What was copied waits in the cache until all is there: an interrupted copy goes on with what is lacking.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.config import SourceConfig
from cnn_tuning.data.transports import CONNECT_S, READ_S, Report, SourceError

_THREADS = 16  # reading small objects is mostly waiting


@dataclass(frozen=True)
class Listed:
    """An object below the prefix; `name` is relative to it."""

    name: str
    key: str
    size: int
    etag: str


def copy_prefix(source: SourceConfig, out: Path, cache: Path, bar: Callable[[str], Report]) -> dict[str, str]:
    """Copy all objects below `source.uri` into `out`, replaced when all are there; raises `SourceError`."""
    held = mirror(source, cache, bar)
    shutil.rmtree(out)
    shutil.move(held, out)
    held.with_suffix(".json").unlink()
    return {"": source.uri}


def mirror(source: SourceConfig, cache: Path, bar: Callable[[str], Report]) -> Path:
    """Bring a folder in the cache up to the objects below `source.uri` and return it; raises `SourceError`.

    Hidden names and empty "folder" objects are left out. What is held under the same ETag is not copied again.
    """
    bucket, _, prefix = source.uri.removeprefix("s3://").partition("/")
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    client = client_of(source)
    objects = list(listed(client, bucket, prefix))
    if not objects:
        raise SourceError("no objects below this prefix")
    held = cache / f"{hashlib.sha256(source.uri.encode()).hexdigest()[:16]}-folder"
    held.mkdir(parents=True, exist_ok=True)
    notes = held.with_suffix(".json")
    done = _noted(notes)
    lacking = [o for o in objects if done.get(o.name) != o.etag or not _complete(held / o.name, o.size)]
    report, total = bar(prefix or bucket), sum(o.size for o in objects)
    moved = total - sum(o.size for o in lacking)

    def copy(item: Listed) -> Listed:
        _download(client, bucket, item, held / item.name)
        return item

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            # A few at a time: after an error no more than these are fetched.
            for start in range(0, len(lacking), 4 * _THREADS):
                for item in pool.map(copy, lacking[start : start + 4 * _THREADS]):
                    done[item.name] = item.etag
                    moved += item.size
                    report(moved, total)
    finally:
        notes.write_text(json.dumps(done))
    kept = {o.name for o in objects}
    for path in [p for p in held.rglob("*") if p.is_file() and str(p.relative_to(held)) not in kept]:
        path.unlink()  # no longer in the bucket
    return held


def client_of(source: SourceConfig) -> Any:
    """Return a client that gives up soon; AWS_ENDPOINT_URL and credentials are taken as by the AWS tools."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    unsigned = {"signature_version": UNSIGNED} if source.unsigned else {}
    retries = {"total_max_attempts": 2}
    settings = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S / 2,  # for each try
        retries=retries,
        max_pool_connections=_THREADS,
        **unsigned,
    )
    return boto3.Session().client("s3", region_name=source.region, config=settings)


def listed(client: Any, bucket: str, prefix: str) -> Iterator[Listed]:
    """Yield the objects below a prefix that may become files below a folder."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                name = entry["Key"][len(prefix) :]
                parts = name.split("/")
                if not name or name.endswith("/") or any(part.startswith(".") for part in parts if part != ".."):
                    continue
                if "" in parts or ".." in parts or "\\" in name or "\0" in name:
                    raise SourceError(f"object {entry['Key']!r} cannot be a file of a folder")
                yield Listed(name, entry["Key"], entry["Size"], entry["ETag"])
    except ClientError as error:
        detail = error.response["Error"]
        raise SourceError(f"S3 {detail.get('Code')}: {detail.get('Message') or 'refused'}") from None
    except BotoCoreError as error:
        raise SourceError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None


def _noted(notes: Path) -> dict[str, str]:
    try:
        noted = json.loads(notes.read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _download(client: Any, bucket: str, item: Listed, target: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not what was put there since the listing.
        answer = client.get_object(Bucket=bucket, Key=item.key, IfMatch=item.etag)
        with target.open("wb") as file:
            for block in answer["Body"].iter_chunks(1 << 18):
                file.write(block)
    except (BotoCoreError, ClientError, HTTPError) as error:
        raise SourceError(f"{item.key}: {str(error).splitlines()[0]}") from None
    if target.stat().st_size != item.size:
        raise SourceError(f"{item.key}: {target.stat().st_size} bytes came instead of {item.size}")
