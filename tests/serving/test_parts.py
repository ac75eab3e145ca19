"""From one S3 prefix into another: every object has its row, and what is written once is not made again."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from live import Ahead, free_port, png

from cnn_tuning.cli import cli
from cnn_tuning.errors import UserError
from cnn_tuning.serving.parts import Summary, predict_prefix
from cnn_tuning.serving.predictor import Predictor

ACCOUNT = "123456789012"  # moto's


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return Predictor(bundle)


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client on it, with the buckets `in` and `out` of this test's own."""
    import boto3
    import httpx

    httpx.post(f"{moto}/moto-api/reset", trust_env=False)
    for name, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "testing-key",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    for name in ("in", "out"):
        client.create_bucket(Bucket=f"pictures-{name}")
    return client


def fill(pictures: dict[str, bytes]) -> None:
    """Put objects into the bucket of pictures, past HTTP: the server is a part of this process."""
    from moto.s3.models import s3_backends

    backend = s3_backends[ACCOUNT]["aws"]
    for name, content in pictures.items():
        backend.put_object("pictures-in", name, content)


def run(predictor: Predictor, source: str = "s3://pictures-in/set/", **options: Any) -> Summary:
    return predict_prefix(predictor, "model one", source, "s3://pictures-out/answers", **options)


def text(s3: Any, name: str) -> str:
    return s3.get_object(Bucket="pictures-out", Key=f"answers/{name}")["Body"].read().decode()


def table(s3: Any, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text(s3, name), newline="")))


def names(s3: Any) -> dict[str, str]:
    """Return what lies in the output, and when it was written."""
    there = s3.list_objects_v2(Bucket="pictures-out").get("Contents", ())
    return {item["Key"].removeprefix("answers/"): str(item["LastModified"]) for item in there}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each object is read."""
    from cnn_tuning.serving.pictures import Bucket

    counted: Counter[str] = Counter()
    read = Bucket.read

    def counting(self: Bucket, path: str) -> bytes:
        counted[path.removeprefix("s3://pictures-in/set/")] += 1
        return read(self, path)

    monkeypatch.setattr(Bucket, "read", counting)
    return counted


def test_more_objects_than_a_listing_holds(
    predictor: Predictor, digits: np.ndarray, s3: Any, reads: Counter[str]
) -> None:
    pictures = [png(image[0]) for image in digits]
    files = {f"set/{n:04}.png": pictures[n % 8] for n in range(1003)}
    fill({**files, "set/folder/": b"", "set/.hidden": b"x", "other/x.png": pictures[0]})
    done = run(predictor, part_size=500, top_k=2)
    assert done == Summary(parts=3, kept=0, predicted=1003, failed=0)
    assert set(names(s3)) == {
        "part-00000.csv",
        "part-00001.csv",
        "part-00002.csv",
        "failures.csv",
        "manifest.json",
    }
    rows = [row for n in range(3) for row in table(s3, f"part-{n:05}.csv")]
    assert [row["path"] for row in rows] == [f"s3://pictures-in/{name}" for name in files]
    expected = predictor.predict([image[0] for image in digits], top_k=2)
    for n, row in enumerate(rows):
        assert (row["label"], row["label_2"]) == (expected[n % 8].label, expected[n % 8].top_k[1].label)
        assert float(row["probability"]) == pytest.approx(expected[n % 8].probability, abs=1e-6)
    manifest = json.loads(text(s3, "manifest.json"))
    assert (manifest["state"], manifest["parts"], manifest["predicted"]) == ("complete", 3, 1003)
    assert set(reads.values()) == {1}


def some(digits: np.ndarray, count: int = 12) -> dict[str, bytes]:
    return {f"set/{n:02}.png": png(digits[n % 8][0]) for n in range(count)}


def test_unreadable_objects_are_listed(predictor: Predictor, digits: np.ndarray, s3: Any) -> None:
    fill({**some(digits, 4), "set/02.png": b"hello", 'set/a,"b".txt': b"", "set/é\n.png": b"x"})
    assert run(predictor, part_size=4) == Summary(2, 0, 3, 3)
    failures = {row["path"]: row["error"] for row in table(s3, "failures.csv")}
    assert set(failures) == {f"s3://pictures-in/set/{name}" for name in ("02.png", 'a,"b".txt', "é\n.png")}
    assert all(error and "\n" not in error for error in failures.values())
    assert {row["path"]: row["error"] for n in range(2) for row in table(s3, f"part-0000{n}.csv")
            if row["error"]} == failures  # fmt: skip


class Stopped(Exception):
    """The process ends here."""


def test_goes_on_where_it_was_stopped(
    predictor: Predictor, digits: np.ndarray, s3: Any, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill({**some(digits), "set/01.png": b"no picture"})
    probabilities, passes = predictor.probabilities, 0

    def stopping(images: np.ndarray) -> np.ndarray:
        nonlocal passes
        passes += 1
        if passes == 6:
            raise Stopped
        return probabilities(images)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "probabilities", stopping)
        with pytest.raises(Stopped):
            run(predictor, part_size=4, batch_size=2)
    assert set(names(s3)) == {"manifest.json", "part-00000.csv", "part-00001.csv"}
    assert json.loads(text(s3, "manifest.json"))["state"] == "running"
    first, written = text(s3, "part-00001.csv"), names(s3)
    reads.clear()
    assert run(predictor, part_size=4, batch_size=2) == Summary(3, 2, 11, 1)
    assert set(reads) == {f"{n:02}.png" for n in range(8, 12)}, "only the part that lacks"
    assert text(s3, "part-00001.csv") == first
    assert {name: names(s3)[name] for name in written if "part" in name} == {
        name: at for name, at in written.items() if "part" in name
    }
    assert [row["path"] for row in table(s3, "failures.csv")] == ["s3://pictures-in/set/01.png"]
    reads.clear()
    assert run(predictor, part_size=4) == Summary(3, 3, 11, 1)
    assert not reads


@pytest.mark.slow
def test_what_has_changed_is_made_again(
    predictor: Predictor, digits: np.ndarray, s3: Any, reads: Counter[str]
) -> None:
    fill(some(digits))
    run(predictor, part_size=4)
    fill({"set/05.png": png(digits[0][0])})
    reads.clear()
    assert run(predictor, part_size=4).kept == 2
    assert set(reads) == {"04.png", "05.png", "06.png", "07.png"}
    assert run(predictor, part_size=4, top_k=2).kept == 0
    assert predict_prefix(predictor, "model two", "s3://pictures-in/set/", "s3://pictures-out/answers",
                          part_size=4, top_k=2).kept == 0  # fmt: skip
    for n in range(2, 12):
        s3.delete_object(Bucket="pictures-in", Key=f"set/{n:02}.png")
    assert run(predictor, part_size=4) == Summary(1, 0, 2, 0)
    assert set(names(s3)) == {"part-00000.csv", "failures.csv", "manifest.json"}, "no part of the earlier listing"


def test_what_could_not_be_had_is_tried_again(
    predictor: Predictor, digits: np.ndarray, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that is gone or closed for now is a failure of this run, not of the picture."""
    from cnn_tuning.serving.pictures import Bucket

    fill(some(digits))
    entries = Bucket.entries

    def listing(self: Bucket) -> Iterator[tuple[str, str]]:
        for name, etag in entries(self):
            yield (f"{name}.gone" if name.endswith("05.png") else name), etag

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "entries", listing)
        assert run(predictor, part_size=4) == Summary(3, 0, 11, 1)
        assert "NoSuchKey" in table(s3, "failures.csv")[0]["error"]
        assert run(predictor, part_size=4) == Summary(3, 2, 11, 1)
    assert run(predictor, part_size=4) == Summary(3, 2, 12, 0)


def test_no_more_than_two_batches_are_in_memory(
    predictor: Predictor, digits: np.ndarray, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(some(digits, 60))
    ahead = Ahead(predictor, monkeypatch)
    run(predictor, batch_size=5, part_size=20)
    assert ahead.read == ahead.done == 60
    assert ahead.most <= 10


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("s3://missing/x/", "s3://pictures-out/a/", "s3://missing/x/: NoSuchBucket"),
        ("s3://pictures-in/set/", "s3://missing/a/", "s3://missing/a/: NoSuchBucket"),
        ("s3://pictures-in/nothing/", "s3://pictures-out/a/", "holds no files"),
        ("s3://pictures-in/set/", "s3://pictures-in/set/answers/", "lies below"),
        ("s3://pictures-in", "s3://pictures-in/answers", "lies below"),
        ("s3:///x", "s3://pictures-out/a/", "no bucket"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    predictor: Predictor, digits: np.ndarray, s3: Any, source: str, output: str, words: str
) -> None:
    fill(some(digits, 1))
    with pytest.raises(UserError, match=words) as caught:
        predict_prefix(predictor, "m", source, output)
    assert "\n" not in str(caught.value)
    assert not names(s3)


def test_credentials_and_network_are_one_line(
    predictor: Predictor, digits: np.ndarray, s3: Any, moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    fill(some(digits, 2))
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(UserError, match="no AWS credentials were found"):
            run(predictor)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(UserError, match="cannot be reached") as caught:
            run(predictor)
    assert "\n" not in str(caught.value)
    httpx.post(f"{moto}/moto-api/reset-auth", content="0", trust_env=False)  # from now on it checks credentials
    try:
        with pytest.raises(UserError, match="does not accept the credentials") as caught:
            run(predictor)
    finally:
        httpx.post(f"{moto}/moto-api/reset-auth", content="inf", trust_env=False)
    assert "\n" not in str(caught.value) and "testing-secret" not in str(caught.value)


def test_credentials_that_expire_on_the_way_stop_it(
    predictor: Predictor, digits: np.ndarray, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What concerns all objects is no failure of each: the parts that follow would be full of it."""
    from botocore.exceptions import ClientError

    from cnn_tuning.serving.pictures import Bucket

    fill(some(digits))
    entries, reads = Bucket.entries, 0

    def expiring(**_: Any) -> None:
        nonlocal reads
        reads += 1
        if reads > 6:
            raise ClientError(
                {"Error": {"Code": "ExpiredToken", "Message": "The token has expired."}}, "GetObject"
            )

    def watched(self: Bucket) -> Iterator[tuple[str, str]]:
        self.client.meta.events.register("before-call.s3.GetObject", expiring, unique_id="once")
        return entries(self)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "entries", watched)
        with pytest.raises(UserError, match="have expired"):
            run(predictor, part_size=4, batch_size=2)
    assert "part-00000.csv" in names(s3) and "part-00001.csv" not in names(s3)
    assert run(predictor, part_size=4).kept == 1


def test_the_command(bundle: Path, digits: np.ndarray, s3: Any) -> None:
    fill({**some(digits, 3), "set/x.png": b"x"})
    command = [
        "predict",
        "s3://pictures-in/set/",
        "--output",
        "s3://pictures-out/answers/",
        "--model",
        str(bundle),
    ]
    first = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "1 part, 3 pictures classified, 1 failed (failures.csv), by bundle version local" in first.stdout
    again = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "1 part (1 were there), 3 pictures" in again.stdout
