"""A training split as LitData chunks: a prepared split comes in, shards and an index go out, to a folder or `s3://…`.

    chunk-0f3c….bin   LitData's form; an item is an image's bytes and its label (int64). Named by its content
    index.json        LitData's index, and the digest of the split that they are made of

LitData's own `optimize` uploads by a client that refuses plain-http endpoints, keeps its temporary files in fixed
places outside the project, and names no content; so its writer makes the chunks and boto3 puts them, and the index
last: without it there are no shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cnn_tuning.data.digests import sha256_of
from cnn_tuning.data.packed import PackedData, PackedSplit
from cnn_tuning.errors import UserError, redact

INDEX = "index.json"
SHARD_MB = 16.0
LABEL_BYTES = 8
REMEDY = "write them again with `cnn-tuning shard`"
ATTEMPTS = 8  # with pauses that grow: S3 may be away for about half a minute
CONNECT_S, READ_S = 5.0, 30.0

_NAME = re.compile(r"chunk-[0-9a-f]{32}\.bin")
_FORM = {
    "data_format": ["bytes"],
    "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
    "compression": None,
    "encryption": None,
    "item_loader": "PyTreeLoader",
}


class Place(Protocol):
    """Where shards are."""

    uri: str

    def text(self, name: str) -> str | None:
        """Return a small file; None where there is none."""

    def holds(self, name: str, size: int) -> bool:
        """Say whether there is a file of this name and size."""

    def put(self, file: Path, name: str) -> None:
        """Keep a file under a name, in one step."""


class Folder:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, uri: str) -> None:
        self.uri, self.path = uri, Path(uri)

    def text(self, name: str) -> str | None:
        """Return a small file; None where there is none."""
        path = self.path / name
        try:
            return path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def holds(self, name: str, size: int) -> bool:
        """Say whether there is a file of this name and size."""
        path = self.path / name
        return path.is_file() and path.stat().st_size == size

    def put(self, file: Path, name: str) -> None:
        """Keep a file under a name, in one step."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{name}.partial"
        partial.write_bytes(file.read_bytes())
        partial.replace(self.path / name)


class Bucket:
    """A prefix in S3; endpoint and credentials are taken from the environment, as by the AWS tools."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.bucket, _, self.prefix = self.uri.removeprefix("s3://").partition("/")
        self._client = _client()

    def text(self, name: str) -> str | None:
        """Return a small object; None where there is none."""
        with_key = {"Bucket": self.bucket, "Key": self._key(name)}
        return self._told(name, lambda: self._client.get_object(**with_key)["Body"].read().decode())

    def holds(self, name: str, size: int) -> bool:
        """Say whether there is an object of this name and size."""
        with_key = {"Bucket": self.bucket, "Key": self._key(name)}
        return self._told(name, lambda: self._client.head_object(**with_key)["ContentLength"]) == size

    def put(self, file: Path, name: str) -> None:
        """Keep a file under a name, in one step."""
        self._told(name, lambda: self._client.upload_file(str(file), self.bucket, self._key(name)))

    def fetch(self, name: str, target: Path) -> None:
        """Bring an object to `target`; others are brought beside it, so this one takes no more threads."""
        from boto3.s3.transfer import TransferConfig

        alone = TransferConfig(use_threads=False)
        given = (self.bucket, self._key(name), str(target))
        if self._told(name, lambda: self._client.download_file(*given, Config=alone) or True) is None:
            raise UserError(f"{self.uri}/{name} is missing: {REMEDY}")

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _told(self, name: str, call: Callable[[], Any]) -> Any:
        """Return what a call returns, None where there is no such object; raises `UserError` for all else."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        try:
            return call()
        except (BotoCoreError, ClientError, Boto3Error, HTTPError) as error:
            if isinstance(error, ClientError) and error.response["Error"].get("Code") in ("404", "NoSuchKey"):
                return None
            reason = redact(str(error)).splitlines()[0]
            raise UserError(f"{self.uri}/{name}: {reason}") from None


def _client() -> Any:
    import boto3
    from botocore.config import Config

    retries: dict[str, Any] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = ATTEMPTS
    settings = Config(connect_timeout=CONNECT_S, read_timeout=READ_S, retries=retries, max_pool_connections=32)
    return boto3.Session().client("s3", config=settings)  # a session of its own may be used in any thread


def place_of(uri: str) -> Folder | Bucket:
    """Return the folder or the S3 prefix that `uri` names."""
    if uri.startswith("s3://"):
        return Bucket(uri)
    if "://" in uri:
        raise UserError(f"{redact(uri)}: shards are in a folder or below s3://BUCKET/PREFIX")
    return Folder(uri)


@dataclass(frozen=True)
class Index:
    """`text`: the whole of `index.json`; `digest`: of the split; `sizes`, `bytes`: of each shard."""

    text: str
    digest: str
    sizes: tuple[int, ...]
    bytes: tuple[int, ...]

    @property
    def own_digest(self) -> str:
        """Return the SHA-256 of the index itself: one split may lie in other shards, and comes in their order."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_index(place: Place) -> Index | None:
    """Read the index of a place, None where there is none; raises `UserError` where it is damaged or not ours.

    LitData believes an index: by a name in it a file could be written anywhere, by a format in it pickles be run.
    """
    text = place.text(INDEX)
    if text is None:
        return None
    try:
        tree = json.loads(text)
        chunks, config = tree["chunks"], tree["config"]
        if {name: config.get(name) for name in _FORM} != _FORM:
            raise ValueError("not of the form that is written here")
        if not chunks or not all(_NAME.fullmatch(chunk["filename"]) for chunk in chunks):
            raise ValueError("a shard's name is not that of its content")
        sizes = tuple(int(chunk["chunk_size"]) for chunk in chunks)
        return Index(text, str(tree["digest"]), sizes, tuple(int(chunk["chunk_bytes"]) for chunk in chunks))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{place.uri}/{INDEX} is damaged ({reason}): {REMEDY}") from None


def index_for(place: Place, digest: str, data: Path) -> Index:
    """Read the index of a place whose shards are of the training split with this digest, or raise `UserError`."""
    index = read_index(place)
    if index is None:
        raise UserError(f"{place.uri} holds no shards (no {INDEX}): {REMEDY}")
    if index.digest != digest:
        raise UserError(
            f"{place.uri} holds shards of other data than the training split of {data} "
            f"(digests {index.digest[:12]} and {digest[:12]}): {REMEDY}"
        )
    return index


def write_shards(
    data: PackedData, uri: str, shard_mb: float = SHARD_MB, bar: Callable[[Any, int], Any] = lambda parts, _: parts
) -> Index:
    """Write the training split as shards of `shard_mb` each, shuffled over all, and then the index.

    The same split and size give the same shards: an interrupted run goes on with what is lacking. One shard is in
    memory at a time. `bar` goes through the shards, given how many there are.
    """
    place, split, digest = place_of(uri), data.split("train"), data.meta.digests["train"]
    there = read_index(place)
    if there is not None and there.digest != digest:
        raise UserError(f"{uri} holds shards of other data (digest {there.digest[:12]}): name another place")
    count = max(1, -(-len(split) * split.images[0].nbytes // int(shard_mb * 1e6)))
    # Near images of a shard stay near, in whatever order an epoch visits the shards.
    order = np.random.default_rng(int(digest[:16], 16)).permutation(len(split))
    chunks: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rows in bar(np.array_split(order, count), count):
            file, chunk, config = _write_chunk(split, np.sort(rows), Path(scratch))  # the disk is read forwards
            chunk["filename"] = f"chunk-{sha256_of(file)[:32]}.bin"
            if not place.holds(chunk["filename"], chunk["chunk_bytes"]):
                place.put(file, chunk["filename"])
            file.unlink()
            chunks.append(chunk)
        tree = {"chunks": chunks, "config": config, "digest": digest}
        (Path(scratch) / INDEX).write_text(json.dumps(tree, sort_keys=True), encoding="utf-8")
        place.put(Path(scratch) / INDEX, INDEX)
    return index_for(place, digest, data.path)


def _write_chunk(
    split: PackedSplit, rows: np.ndarray, folder: Path
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return LitData's file of some rows, with what its index says of it and of all."""
    from litdata.streaming.writer import BinaryWriter

    with tempfile.TemporaryDirectory(dir=folder) as own:
        writer = BinaryWriter(own, chunk_size=len(rows))
        for position, item in enumerate(_items(split, rows)):
            writer[position] = item
        (path,) = writer.done()
        (index,) = Path(own).glob(f"*.{INDEX}")
        tree = json.loads(index.read_text())
        (chunk,) = tree["chunks"]
        return Path(path).replace(folder / "chunk.bin"), chunk, {**tree["config"], "chunk_size": None}


def _items(split: PackedSplit, rows: np.ndarray) -> Iterator[bytes]:
    labels = split.labels[rows].astype("<i8")
    for row, label in zip(rows.tolist(), labels, strict=True):
        yield split.images[row].tobytes() + label.tobytes()
