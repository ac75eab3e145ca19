"""A folder, a file or s3://bucket/prefix in; its files' paths, in a fixed order, and their bytes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from cnn_tuning.data.images import BadImage
from cnn_tuning.errors import UserError

MAX_FILE_BYTES = 500_000_000


class Source(Protocol):
    """Somewhere with pictures; `threads` is how many to read at once."""

    name: str
    threads: int

    def paths(self) -> Iterator[str]:
        """Yield the files' names in a fixed order, hidden ones left out; may be called again."""

    def count(self) -> int:
        """Return how many names `paths` yields."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes; raises `BadImage` with the reason where that fails."""


def open_source(source: str) -> Source:
    """Return the pictures at a path or an s3:// prefix; a source that cannot be read is a `UserError`."""
    if source.startswith("s3://"):
        return Bucket(source)
    if not Path(source).exists():
        raise UserError(f"{source}: no such file or folder; give one, or s3://bucket/prefix")
    return Folder(source)


class Folder:
    """A local folder with all below it, or one file."""

    threads = os.cpu_count() or 1

    def __init__(self, name: str) -> None:
        self.name = name

    def paths(self) -> Iterator[str]:
        """Yield paths that begin with the folder's name as it was given."""
        if Path(self.name).is_file():
            yield self.name
            return
        for folder, folders, files in os.walk(self.name, onerror=_unlistable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (str(Path(folder) / name) for name in sorted(files) if not name.startswith("."))

    def count(self) -> int:
        """Walk once without keeping the names."""
        return sum(1 for _ in self.paths())

    def read(self, path: str) -> bytes:
        """Return the bytes of a regular file."""
        file = Path(path)
        try:
            if not file.is_file():
                raise BadImage("not a regular file")
            _check_bytes(file.stat().st_size)
            return file.read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None


class Bucket:
    """The objects below an s3:// prefix; AWS_ENDPOINT_URL and credentials are taken as by the AWS tools."""

    threads = 16  # reading from S3 is mostly waiting

    def __init__(self, uri: str) -> None:
        import boto3
        from botocore.config import Config

        # Not urlsplit: `#` and `?` are letters of a key like any others.
        self.bucket, _, self.prefix = uri.removeprefix("s3://").partition("/")
        self.name = uri
        if not self.bucket:
            raise UserError(f"{uri}: no bucket; give s3://bucket/prefix")
        settings = Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"total_max_attempts": 3},
            max_pool_connections=self.threads,
        )
        self.client = boto3.client("s3", config=settings)
        next(self.paths(), None)  # refused, missing and unreachable buckets speak up before any work

    def paths(self) -> Iterator[str]:
        """Yield s3:// names in the order of S3's listing; empty "folder" objects are left out."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            for page in pages:
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/") and not entry["Key"].rpartition("/")[2].startswith("."):
                        yield f"s3://{self.bucket}/{entry['Key']}"
        except (BotoCoreError, ClientError) as error:
            raise UserError(f"{self.name}: cannot be listed: {_reason(error)}") from None

    def count(self) -> int:
        """List once without keeping the names: a request per thousand."""
        return sum(1 for _ in self.paths())

    def read(self, path: str) -> bytes:
        """Return an object's bytes."""
        from botocore.exceptions import BotoCoreError, ClientError

        key = path.removeprefix(f"s3://{self.bucket}/")
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=key)
            _check_bytes(answer["ContentLength"])
            return answer["Body"].read()
        except (BotoCoreError, ClientError, OSError) as error:
            raise BadImage(f"cannot be read: {_reason(error)}") from None


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BadImage(f"{size} bytes, more than the limit of {MAX_FILE_BYTES}")


def _reason(error: Any) -> str:
    """Return one line without credentials (botocore puts none into its messages)."""
    return " ".join(str(error).split())[:200]


def _unlistable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None
