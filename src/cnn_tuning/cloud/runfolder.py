"""What stands below s3://BUCKET/PREFIX/runs/RUN: objects and JSON go in and out; trouble is a `UserError`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.cloud.aws import code_of, telling
from cnn_tuning.errors import UserError

_MISSING = ("NoSuchKey", "404")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. `s3` is a client of boto3."""

    s3: Any
    bucket: str
    prefix: str

    @classmethod
    def at(cls, url: str, region: str, *, patient: bool = True) -> RunFolder:
        """Return the folder at `s3://BUCKET/PREFIX`. Not patient: three tries, over within 12 s."""
        import boto3
        from botocore.config import Config

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        attempts = {"mode": "standard", "total_max_attempts": 4 if patient else 3}
        connect_s, read_s = (3, 20) if patient else (2, 3)
        settings = Config(connect_timeout=connect_s, read_timeout=read_s, retries=attempts)
        with telling(f"bucket {bucket}"):
            s3 = boto3.Session().client("s3", region_name=region, config=settings)
        return cls(s3, bucket, prefix.rstrip("/"))

    def key(self, name: str) -> str:
        """Return an object's key in the bucket."""
        return f"{self.prefix}/{name}"

    def check(self) -> None:
        """Ask for one name below it, to say at once why it cannot be had."""
        with telling(f"bucket {self.bucket}"):
            self.s3.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/", MaxKeys=1)

    def put_json(self, name: str, value: Any) -> None:
        """Write one JSON object; a reader sees the old one or the new one."""
        with telling(f"bucket {self.bucket}: {name}"):
            self.s3.put_object(
                Bucket=self.bucket,
                Key=self.key(name),
                Body=json.dumps(value).encode(),
                ContentType="application/json",
            )

    def get_json(self, name: str) -> Any:
        """Return a JSON object, or None if there is none."""
        from botocore.exceptions import ClientError

        with telling(f"bucket {self.bucket}: {name}"):
            try:
                text = self.s3.get_object(Bucket=self.bucket, Key=self.key(name))["Body"].read()
            except ClientError as error:
                if code_of(error) in _MISSING:
                    return None
                raise
        try:
            return json.loads(text)
        except ValueError:
            raise UserError(f"s3://{self.bucket}/{self.key(name)} is no JSON") from None

    def put_file(self, name: str, path: Path) -> None:
        """Upload a file, in parts where it is large."""
        with telling(f"bucket {self.bucket}: {name}"), path.open("rb") as file:
            self.s3.upload_fileobj(file, self.bucket, self.key(name))

    def get_file(self, name: str, path: Path) -> bool:
        """Download into a file; False if there is no such object."""
        from botocore.exceptions import ClientError

        with telling(f"bucket {self.bucket}: {name}"), path.open("wb") as file:
            try:
                self.s3.download_fileobj(self.bucket, self.key(name), file)
            except ClientError as error:
                if code_of(error) in _MISSING:
                    return False
                raise
        return True

    def md5_of(self, name: str) -> str | None:
        """Return the MD5 of an object's content, which is read for it; None if there is no such object."""
        from botocore.exceptions import ClientError

        digest = hashlib.md5(usedforsecurity=False)
        with telling(f"bucket {self.bucket}: {name}"):
            try:
                body = self.s3.get_object(Bucket=self.bucket, Key=self.key(name))["Body"]
            except ClientError as error:
                if code_of(error) in _MISSING:
                    return None
                raise
            for block in body.iter_chunks(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Remove an object."""
        with telling(f"bucket {self.bucket}: {name}"):
            self.s3.delete_object(Bucket=self.bucket, Key=self.key(name))

    def put_new(self, name: str, folder: Path, files: Iterable[Path]) -> int:
        """Upload those `files` below `folder` that are not there yet with the same bytes; return how many."""
        with telling(f"bucket {self.bucket}: {name}"):
            pages = self.s3.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{self.key(name)}/"
            )
            listed = [item for page in pages for item in page.get("Contents", ())]
        there = {item["Key"]: (item["Size"], item["ETag"].strip('"')) for item in listed}
        count = 0
        for file in files:
            place = f"{name}/{file.relative_to(folder).as_posix()}"
            if there.get(self.key(place)) != (file.stat().st_size, _md5(file)):
                self.put_file(place, file)
                count += 1
        return count


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
