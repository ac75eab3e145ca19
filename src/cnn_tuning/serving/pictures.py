"""A folder, a file or s3://bucket/prefix in; its files' paths, in a fixed order, and their bytes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from cnn_tuning.cloud.aws import code_of
from cnn_tuning.data.images import BadImage
from cnn_tuning.errors import UserError
from cnn_tuning.serving.asking import asking

MAX_FILE_BYTES = 500_000_000
# What S3 says about one object and not about all: gone since the listing, closed to this reader, archived.
OF_ONE = {"NoSuchKey", "404", "AccessDenied", "403", "InvalidObjectState", "InternalError", "500"}


class Unread(BadImage):
    """What was not had, for a reason that may pass: nothing is known about the picture."""


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
        self.name = uri
        self.bucket, self.prefix = split_uri(uri)
        self.client = s3_client(uri, self.threads)
        next(self.entries(), None)  # refused, missing and unreachable buckets speak up before any work

    def entries(self) -> Iterator[tuple[str, str]]:
        """Yield s3:// names with what tells their content (ETag), in the order of S3's listing.

        Empty "folder" objects are left out.
        """
        for key, version in listed(self.client, self.name, self.bucket, self.prefix):
            if not key.endswith("/") and not key.rpartition("/")[2].startswith("."):
                yield f"s3://{self.bucket}/{key}", version

    def paths(self) -> Iterator[str]:
        """Yield the names alone."""
        return (path for path, _ in self.entries())

    def count(self) -> int:
        """List once without keeping the names: a request per thousand."""
        return sum(1 for _ in self.paths())

    def read(self, path: str) -> bytes:
        """Return an object's bytes; what concerns all objects (credentials, network) is a `UserError`."""
        from botocore.exceptions import ClientError, IncompleteReadError

        key = path.removeprefix(f"s3://{self.bucket}/")
        with asking(self.name):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=key)
                _check_bytes(answer["ContentLength"])
                return answer["Body"].read()
            except (ClientError, IncompleteReadError, OSError) as error:
                if isinstance(error, ClientError) and code_of(error) not in OF_ONE:
                    raise
                raise Unread(f"cannot be read: {_reason(error)}") from None


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of s3://bucket/prefix."""
    # Not urlsplit: `#` and `?` are letters of a key like any others.
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; give s3://bucket/prefix")
    return bucket, prefix


def s3_client(uri: str, connections: int) -> Any:
    """Return a client that gives up within two minutes."""
    import boto3
    from botocore.config import Config

    settings = Config(
        connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 3}, max_pool_connections=connections
    )
    with asking(uri):
        return boto3.Session().client("s3", config=settings)


def listed(client: Any, uri: str, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield keys and ETags below a prefix; raises `UserError` where they cannot be listed."""
    with asking(uri):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            yield from ((entry["Key"], entry["ETag"]) for entry in page.get("Contents", ()))


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BadImage(f"{size} bytes, more than the limit of {MAX_FILE_BYTES}")


def _reason(error: Any) -> str:
    """Return one line without credentials (botocore puts none into its messages)."""
    return " ".join(str(error).split())[:200]


def _unlistable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None
