"""A run's place in the bucket: what its hosts write there, and the laptop's own record of it (`run.json`).

The laptop writes code.bundle, run.json and stop.json; hosts write state.json, progress.json, boot.log and results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from cnn_tuning.cloud.aws import Aws, code_of, telling
from cnn_tuning.cloud.names import check_run
from cnn_tuning.config import HostConfig
from cnn_tuning.errors import UserError

RECORD = "run.json"
Mode = Literal["pipeline", "interactive"]


@dataclass(frozen=True)
class Listed:
    """An object in a folder, named below it. `etag`: its MD5, unless it came in parts or is under a key of KMS."""

    name: str
    size: int
    etag: str
    changed: float


@dataclass(frozen=True)
class Place:
    """The objects of one run."""

    s3: Any
    bucket: str
    prefix: str
    run: str

    @property
    def url(self) -> str:
        """Return where they are, for people."""
        return f"s3://{self.bucket}/{self.prefix}/runs/{self.run}/"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/runs/{self.run}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return an object, None if there is none."""
        from botocore.exceptions import ClientError

        with telling(f"bucket {self.bucket}"):
            try:
                body = self.s3.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
            except ClientError as error:
                if code_of(error) in ("NoSuchKey", "404"):
                    return None
                raise
        return bytes(body)

    def tail(self, name: str) -> list[str]:
        """Return the last lines of an object that may be long, none where there is none."""
        from botocore.exceptions import ClientError

        with telling(f"bucket {self.bucket}"):
            try:
                got = self.s3.get_object(Bucket=self.bucket, Key=self._key(name), Range="bytes=-4000")
            except ClientError as error:
                if code_of(error) in ("NoSuchKey", "404", "InvalidRange", "416"):
                    return []
                raise
            return got["Body"].read().decode(errors="replace").splitlines()[-20:]

    def read_json(self, name: str) -> dict[str, Any]:
        """Return an object as a mapping, empty where there is none or it is damaged."""
        try:
            told = json.loads(self.read(name) or b"{}")
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}

    def write(self, name: str, body: bytes) -> None:
        """Write an object."""
        with telling(f"bucket {self.bucket}"):
            self.s3.put_object(Bucket=self.bucket, Key=self._key(name), Body=body)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with telling(f"bucket {self.bucket}"):
            self.s3.delete_object(Bucket=self.bucket, Key=self._key(name))

    def listed(self, folder: str) -> Iterator[Listed]:
        """Yield each object in a folder such as `spool/`."""
        start = self._key(folder)
        with telling(f"bucket {self.bucket}"):
            pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            for page in pages:
                for item in page.get("Contents", []):
                    yield Listed(
                        item["Key"].removeprefix(start),
                        item["Size"],
                        item["ETag"].strip('"'),
                        item["LastModified"].timestamp(),
                    )


@dataclass(frozen=True)
class Rented:
    """One host of a run. `per_hour` in US dollars with disk and address; the highest that was seen."""

    id: str
    type: str
    market: str
    attempt: int
    launched: str
    per_hour: float
    ends: str
    ended: str | None = None

    def hours(self, now: datetime) -> float:
        """Return for how long it has run."""
        last = datetime.fromisoformat(self.ended) if self.ended else now
        return max(0.0, (last - datetime.fromisoformat(self.launched)).total_seconds() / 3600)

    def usd(self, now: datetime) -> float:
        """Return what it has cost."""
        return self.hours(now) * self.per_hour


@dataclass(frozen=True)
class Record:
    """What the laptop knows of a run. `overrides`, `measured` (speeds of types): as given, for another launch.

    `lock` and `params` are digests of `dvc.lock` here at the launch and of the parameters that went along.
    `attempts` counts launches that came to an end, in a host or in a refusal: the next one's number. `asked`,
    `ends`: of a launch that has not come to its end: when it began, and when its host is to end.
    """

    run: str
    commit: str
    experiment: str
    overrides: tuple[str, ...]
    lock: str
    params: str
    mode: Mode = "pipeline"
    measured: tuple[str, ...] = ()
    attempts: int = 0
    asked: str | None = None
    ends: str | None = None
    hosts: tuple[Rented, ...] = ()

    def usd(self, now: datetime) -> float:
        """Return what all its hosts have cost."""
        return sum(host.usd(now) for host in self.hosts)

    def hours(self, now: datetime) -> float:
        """Return for how long hosts of it have run."""
        return sum(host.hours(now) for host in self.hosts)

    def spent(self) -> Record:
        """Return it with the launch that has not come to its end given up: its number is not used again."""
        return replace(self, attempts=self.attempts + (self.asked is not None), asked=None, ends=None)

    def with_last(self, **changes: Any) -> Record:
        """Return it with its last host changed."""
        return replace(self, hosts=(*self.hosts[:-1], replace(self.hosts[-1], **changes)))


def place_of(aws: Aws, host: HostConfig, run: str) -> Place:
    """Return where a run's objects are."""
    if not host.bucket:
        raise UserError("host.bucket is not set: make one with `cnn-tuning remote init BUCKET`")
    return Place(aws.client("s3"), host.bucket, host.prefix, check_run(run))


def read_record(place: Place) -> Record | None:
    """Return the run's record, None where there is no such run."""
    return _record(place.read_json(RECORD))


def _record(told: Mapping[str, Any]) -> Record | None:
    try:
        hosts = tuple(Rented(**host) for host in told["hosts"])
        return Record(
            **{
                **told,
                "overrides": tuple(told["overrides"]),
                "measured": tuple(told.get("measured", ())),
                "hosts": hosts,
            }
        )
    except (KeyError, TypeError):
        return None


def known_record(place: Place) -> Record:
    """Return the run's record, or say that there is no such run."""
    record = read_record(place)
    if record is None:
        raise UserError(f"run {place.run}: nothing of it is in {place.url} (`cnn-tuning host cost` names runs)")
    return record


def write_record(place: Place, record: Record) -> Record:
    """Keep the record; return it."""
    place.write(RECORD, json.dumps(asdict(record), indent=1).encode())
    return record


def runs_in(aws: Aws, host: HostConfig) -> list[str]:
    """Return the runs that have a place in the bucket."""
    start = f"{host.prefix}/runs/"
    with telling(f"bucket {host.bucket}"):
        pages = aws.client("s3").get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=host.bucket, Prefix=start, Delimiter="/")
        return [
            item["Prefix"].removeprefix(start).rstrip("/")
            for page in found
            for item in page.get("CommonPrefixes", [])
        ]
