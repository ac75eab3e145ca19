"""The folder predictor: a row for every file, the predictor's own answers, all or nothing on disk."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from live import Ahead, free_port, png

from cnn_tuning.errors import UserError
from cnn_tuning.serving.batch import Summary, predict_folder
from cnn_tuning.serving.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return Predictor(bundle)


@pytest.fixture(scope="module")
def pictures(digits: np.ndarray) -> dict[str, bytes]:
    """Files by name: eight pictures, two that are none, and what is left out."""
    files = {f"{'ab'[n % 2]}/{n}.png": png(image[0]) for n, image in enumerate(digits)}
    return {**files, "b/empty.png": b"", "readme.txt": b"hello", ".hidden.png": b"x", "a/.DS_Store": b"x"}


@pytest.fixture
def folder(pictures: dict[str, bytes], tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name, content in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_every_file_has_its_row(
    predictor: Predictor, folder: Path, pictures: dict[str, bytes], tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "new" / "predictions.csv"
    summary = predict_folder(predictor, str(folder), out, top_k=3, batch_size=batch_size)
    assert summary == Summary(8, 2)
    rows = _read(out)
    assert [str(Path(row["path"]).relative_to(folder)) for row in rows] == [
        "readme.txt",
        *(f"a/{n}.png" for n in (0, 2, 4, 6)),
        *(f"b/{n}.png" for n in (1, 3, 5, 7)),
        "b/empty.png",
    ]
    for row in rows:
        name = str(Path(row["path"]).relative_to(folder))
        if row["error"]:
            assert name in ("readme.txt", "b/empty.png") and row["label"] == ""
            continue
        (expected,) = predictor.predict([pictures[name]], top_k=3)
        assert (row["label"], int(row["index"])) == (expected.label, expected.index)
        assert float(row["probability"]) == pytest.approx(expected.probability, abs=1e-6)
        assert [row["label_2"], row["label_3"]] == [choice.label for choice in expected.top_k[1:]]
    assert [file.name for file in out.parent.iterdir()] == ["predictions.csv"]


def test_answers_are_those_of_the_same_batch_in_memory(
    predictor: Predictor, digits: np.ndarray, tmp_path: Path
) -> None:
    for number, image in enumerate(digits):
        (tmp_path / f"{number}.png").write_bytes(png(image[0]))
    out = tmp_path.parent / f"{tmp_path.name}.csv"
    predict_folder(predictor, str(tmp_path), out)
    expected = [prediction.probability for prediction in predictor.predict([image[0] for image in digits])]
    assert [float(row["probability"]) for row in _read(out)] == expected


def test_one_file(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    assert predict_folder(predictor, str(folder / "a" / "0.png"), tmp_path / "out.csv") == Summary(1, 0)


def test_more_files_than_fit_a_batch_stay_out_of_memory(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many files there are, no more than two batches of them are read ahead."""
    picture, many = (folder / "a" / "0.png").read_bytes(), tmp_path / "many"
    many.mkdir()
    for number in range(60):
        (many / f"{number:03}.png").write_bytes(picture)
    ahead = Ahead(predictor, monkeypatch)
    predict_folder(predictor, str(many), tmp_path / "out.csv", batch_size=5)
    assert ahead.read == ahead.done == 60
    assert ahead.most <= 10


def test_pipes_and_unreadable_files_are_rows(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "dangling.png").symlink_to("nowhere.png")
    predict_folder(predictor, str(folder), tmp_path / "out.csv")
    errors = {Path(row["path"]).name: row["error"] for row in _read(tmp_path / "out.csv") if row["error"]}
    assert set(errors) == {"pipe.png", "dangling.png", "readme.txt", "empty.png"}
    assert all("\n" not in error for error in errors.values())


def test_odd_names(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    picture = (folder / "a" / "0.png").read_bytes()
    odd = tmp_path / "odd"
    odd.mkdir()
    names = [b"a,b.png", b'q"uote.png', b"new\nline.png", "é.png".encode(), b"\xff.png"]
    for name in names:
        Path(os.fsdecode(bytes(odd) + b"/" + name)).write_bytes(picture)
    assert predict_folder(predictor, str(odd), tmp_path / "out.csv") == Summary(5, 0)
    assert {Path(row["path"]).name for row in _read(tmp_path / "out.csv")} >= {
        "a,b.png",
        'q"uote.png',
        "é.png",
        "\\udcff.png",
    }


def test_mistakes_leave_nothing_behind(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def counted(image: bytes) -> np.ndarray:
        nonlocal read
        read += 1
        return Predictor.prepare(predictor, image)

    monkeypatch.setattr(predictor, "prepare", counted)
    out = tmp_path / "out" / "predictions.csv"
    empty = tmp_path / "empty"
    empty.mkdir()
    blocked = tmp_path / "file"
    blocked.write_text("")
    for source, target, top_k, words in [
        (tmp_path / "none", out, 1, "no such file or folder"),
        (empty, out, 1, "no files"),
        (folder, out, 11, "from 1 to 10"),
        (folder, blocked / "predictions.csv", 1, "cannot be written"),
        (folder, empty, 1, "is a folder"),
    ]:
        with pytest.raises(UserError, match=words):
            predict_folder(predictor, str(source), target, top_k=top_k)
    assert not out.exists() and not list(out.parent.glob(".*")) and not list(empty.iterdir())
    assert read == 0, "noticed before any picture is read"


def test_two_runs_into_one_file_do_not_write_over_each_other(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last to end wins, with all of its rows."""
    out, probabilities = tmp_path / "out.csv", predictor.probabilities
    inner: list[Summary] = []

    def at_the_same_time(images: np.ndarray) -> np.ndarray:
        if not inner:
            inner.append(Summary(0, 0))
            inner[0] = predict_folder(predictor, str(folder / "a"), out, batch_size=1)
            assert len(_read(out)) == 4
        return probabilities(images)

    monkeypatch.setattr(predictor, "probabilities", at_the_same_time)
    assert predict_folder(predictor, str(folder), out, batch_size=2) == Summary(8, 2)
    assert inner == [Summary(4, 0)] and len(_read(out)) == 10


def test_an_interrupted_run_keeps_the_old_csv(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")

    def interrupted(images: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor, "probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(predictor, str(folder), out)
    assert out.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.csv", "pictures"]


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 server of moto on the loopback, set up as a user would: by environment variables."""
    for name, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return "pictures"


def test_s3_prefix(
    predictor: Predictor, pictures: dict[str, bytes], folder: Path, tmp_path: Path, s3: str
) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=s3)
    for name, content in pictures.items():
        client.put_object(Bucket=s3, Key=f"set/{name}", Body=content)
    client.put_object(Bucket=s3, Key="set/folder/", Body=b"")
    client.put_object(Bucket=s3, Key="odd?#/a#1?.png", Body=pictures["a/0.png"])
    client.put_object(Bucket=s3, Key="other/x.png", Body=b"not asked for")
    assert predict_folder(predictor, f"s3://{s3}/set/", tmp_path / "s3.csv", batch_size=3) == Summary(8, 2)
    predict_folder(predictor, str(folder), tmp_path / "local.csv", batch_size=3)
    local = {row["path"].removeprefix(f"{folder}/"): row["label"] for row in _read(tmp_path / "local.csv")}
    assert {
        row["path"].removeprefix(f"s3://{s3}/set/"): row["label"] for row in _read(tmp_path / "s3.csv")
    } == local
    assert predict_folder(predictor, f"s3://{s3}/odd?#/", tmp_path / "odd.csv") == Summary(1, 0)
    for uri, words in [
        ("s3://missing-bucket/x", "NoSuchBucket"),
        (f"s3://{s3}/nothing/", "no files"),
        ("s3:///x", "no bucket"),
    ]:
        with pytest.raises(UserError, match=words):
            predict_folder(predictor, uri, tmp_path / "none.csv")


def test_s3_out_of_reach_is_one_line(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="cannot be reached") as caught:
        predict_folder(predictor, "s3://bucket/x", tmp_path / "none.csv")
    assert "\n" not in str(caught.value)
