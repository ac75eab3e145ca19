"""s3://bucket/prefix of pictures in, CSV parts below another prefix out: `cnn-tuning predict s3://… --output s3://…`

Below the output: `part-00000.csv` and so on, each of PART pictures in the order of the listing; `failures.csv`
with path and reason; `manifest.json`, whose `state` is `complete` only when all of them are there. S3 shows an
object whole or not at all. A part carries a digest of what it was made of (model, top_k, names and ETags): where
it stands with that digest already, and nothing in it failed to be read, it is not made again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from tempfile import TemporaryFile
from typing import IO, Any

from cnn_tuning.cloud.aws import code_of
from cnn_tuning.data.digests import sha256_of
from cnn_tuning.errors import UserError
from cnn_tuning.serving.asking import asking
from cnn_tuning.serving.batch import answered, header, progress
from cnn_tuning.serving.inputs import check_top_k
from cnn_tuning.serving.pictures import Bucket, Unread, listed, split_uri
from cnn_tuning.serving.predictor import Predictor
from cnn_tuning.serving.server import Served

PART = 10_000
_NAME = re.compile(r"part-\d{5,}\.csv")


@dataclass(frozen=True)
class Made:
    """How many pictures of a part got a prediction, are no pictures, and could not be had."""

    predicted: int
    unreadable: int
    unread: int


@dataclass(frozen=True)
class Summary:
    """A finished run. `kept`: parts that were there already; `failed`: pictures without a prediction."""

    parts: int
    kept: int
    predicted: int
    failed: int

    def describe(self) -> str:
        """Return it in a few words."""
        parts = "1 part" if self.parts == 1 else f"{self.parts:,} parts"
        kept = f" ({self.kept:,} were there)" if self.kept else ""
        failed = f", {self.failed:,} failed (failures.csv)" if self.failed else ""
        return f"{parts}{kept}, {self.predicted:,} pictures classified{failed},"


@dataclass(frozen=True)
class Prefix:
    """Where the output goes."""

    uri: str
    client: Any
    bucket: str
    prefix: str

    def put(self, name: str, body: bytes | IO[bytes], kind: str, about: dict[str, str] | None = None) -> None:
        """Write one object."""
        with asking(self.uri):
            self.client.put_object(
                Bucket=self.bucket, Key=self.prefix + name, Body=body, ContentType=kind, Metadata=about or {}
            )

    def about(self, name: str) -> dict[str, str]:
        """Return what was written with an object; nothing if it is not there."""
        from botocore.exceptions import ClientError

        with asking(self.uri):
            try:
                head = self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)
            except ClientError as error:
                if code_of(error) in ("404", "NoSuchKey"):
                    return {}
                raise
        return dict(head["Metadata"])

    def read(self, name: str) -> bytes:
        """Return an object's bytes."""
        with asking(self.uri):
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            return bytes(answer["Body"].read())

    def drop(self, names: Iterable[str]) -> None:
        """Remove objects."""
        with asking(self.uri):
            for name in names:
                self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)


@dataclass(frozen=True)
class Work:
    """What is done to each part."""

    predictor: Predictor
    pictures: Bucket
    out: Prefix
    model: str
    top_k: int
    batch_size: int

    def digest(self, group: list[tuple[str, str]]) -> str:
        """Return what a part is made of, as a digest."""
        return hashlib.sha256(json.dumps([self.model, self.top_k, group]).encode()).hexdigest()

    def kept(self, name: str, digest: str) -> Made | None:
        """Return what an earlier run made of the same, if all of it could be had."""
        about = self.out.about(name)
        if about.get("digest") != digest:
            return None
        made = Made(int(about["predicted"]), int(about["unreadable"]), int(about["unread"]))
        return None if made.unread else made

    def make(
        self, name: str, group: list[tuple[str, str]], failures: Any, advance: Callable[[int, int], None]
    ) -> Made:
        """Predict on a part and write it."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(header(self.top_k))
        predicted = unreadable = unread = 0
        for answers in answered(
            self.predictor, self.pictures, (path for path, _ in group), self.top_k, self.batch_size
        ):
            table.writerows(answers.rows)
            failures.writerows((row[0], row[-1]) for row in answers.rows if row[0] in answers.failed)
            passing = sum(isinstance(error, Unread) for error in answers.failed.values())
            predicted += len(answers.rows) - len(answers.failed)
            unreadable, unread = unreadable + len(answers.failed) - passing, unread + passing
            advance(len(answers.rows), len(answers.failed))
        made = Made(predicted, unreadable, unread)
        about = {"digest": self.digest(group), **{key: str(value) for key, value in asdict(made).items()}}
        self.out.put(name, text.getvalue().encode(), "text/csv", about)
        return made

    def failures_of(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield path and reason of the failures that a part lists."""
        for row in csv.DictReader(io.StringIO(self.out.read(name).decode(), newline="")):
            if row["error"]:
                yield row["path"], row["error"]


def identity(served: Served) -> str:
    """Return a model's name, and what tells apart two models of one name."""
    whole = hashlib.sha256()
    for file in sorted(path for path in served.bundle.rglob("*") if path.is_file()):
        whole.update(f"{file.relative_to(served.bundle)} {sha256_of(file)}\n".encode())
    return f"{served.name} version {served.version} ({whole.hexdigest()[:16]})"


def predict_prefix(
    predictor: Predictor,
    model: str,
    source: str,
    output: str,
    *,
    top_k: int = 1,
    batch_size: int = 256,
    part_size: int = PART,
) -> Summary:
    """Predict on everything below `source` and write it below `output`; what an earlier run wrote is kept.

    `model` pins what predicts, as a digest does: a part made by another one is made again.

    Raises:
        UserError: source or output cannot be used. What is written by then is used by the next run.
    """
    top_k = check_top_k(top_k, len(predictor.classes))
    if batch_size < 1 or part_size < 1:
        raise UserError(f"batch size {batch_size}, part size {part_size}: give at least 1")
    pictures = Bucket(source)
    out = _opened(pictures.client, source, output)
    total = pictures.count()
    if not total:
        raise UserError(f"{source}: holds no files to predict on")
    told = {"source": source, "model": model, "top_k": top_k}
    out.put("manifest.json", _json({"state": "running", **told}), "application/json")
    with TemporaryFile() as file:
        done = _all_parts(Work(predictor, pictures, out, model, top_k, batch_size), part_size, total, file)
        file.seek(0)
        out.put("failures.csv", file, "text/csv")
    stale = [name for name in _parts_there(out) if int(name[5:-4]) >= done.parts]
    out.drop(stale)
    out.put("manifest.json", _json({"state": "complete", **told, **asdict(done)}), "application/json")
    return done


def _all_parts(work: Work, part_size: int, total: int, file: IO[bytes]) -> Summary:
    """Make the parts that lack, one after the other, and write all failures to `file`."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    failures = csv.writer(text)
    failures.writerow(["path", "error"])
    entries = work.pictures.entries()
    parts = kept = predicted = failed = 0
    with progress(total) as show:

        def advance(count: int, more_failed: int) -> None:
            nonlocal failed
            failed += more_failed
            show(count, f"{failed:,} failed" if failed else "")

        while group := list(islice(entries, part_size)):
            name = f"part-{parts:05}.csv"
            made = work.kept(name, work.digest(group))
            if made is None:
                made = work.make(name, group, failures, advance)
            else:
                kept += 1
                failures.writerows(work.failures_of(name) if made.unreadable else ())
                advance(len(group), made.unreadable)
            parts, predicted = parts + 1, predicted + made.predicted
    text.detach()  # flushed, and `file` stays open
    return Summary(parts, kept, predicted, failed)


def _opened(client: Any, source: str, output: str) -> Prefix:
    """Return the output's prefix; it must not lie where its own objects would be taken for pictures."""
    bucket, prefix = split_uri(output)
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    of, below = split_uri(source)
    if of == bucket and prefix.startswith(below):
        raise UserError(f"{output}: lies below {source}: give --output a prefix beside it")
    out = Prefix(output, client, bucket, prefix)
    next(listed(out.client, output, bucket, prefix), None)
    return out


def _parts_there(out: Prefix) -> Iterator[str]:
    for key, _ in listed(out.client, out.uri, out.bucket, f"{out.prefix}part-"):
        if _NAME.fullmatch(name := key.removeprefix(out.prefix)):
            yield name


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
