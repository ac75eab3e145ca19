"""Streamed training: each image once an epoch over all processes, resumed anywhere, a bounded cache, a real S3."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT, free_port
from seaweed import BUCKET, _weed, seaweed  # noqa: F401 - fixtures
from training_recipes import SignalAt, recipe_with, same

from cnn_tuning.cli import cli
from cnn_tuning.config import patch
from cnn_tuning.data import stream
from cnn_tuning.data.batches import Share
from cnn_tuning.data.packed import Meta, PackedData, digest_of
from cnn_tuning.data.shards import place_of, read_index, write_shards
from cnn_tuning.data.stream import StreamedBatches, open_shards
from cnn_tuning.diagnosis.evidence import gather
from cnn_tuning.diagnosis.range_test import range_test
from cnn_tuning.errors import UserError
from cnn_tuning.training import follower
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted

CPU = torch.device("cpu")


def numbered_data(folder, packed, count: int, channels: int, side: int) -> PackedData:
    """Write prepared data whose every training image says which one it is, sorted by class."""
    images = np.zeros((count, channels, side, side), np.uint8)
    numbers = np.arange(count)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    labels = numbers * 10 // count
    (folder / "train").mkdir(parents=True)
    np.save(folder / "train/images.npy", images)
    np.save(folder / "train/labels.npy", labels)
    tree = json.loads(packed.meta.to_json())
    tree["image"] |= {"channels": channels, "size": [side, side]}
    tree["counts"] = {"train": np.bincount(labels).tolist()}
    tree["digests"] = {"train": digest_of(images, labels)}
    (folder / "meta.json").write_text(Meta.from_json(json.dumps(tree)).to_json())
    return PackedData.open(folder)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, packed) -> PackedData:
    return numbered_data(tmp_path_factory.mktemp("numbered") / "data", packed, 1000, 1, 8)


@pytest.fixture(scope="module")
def shards(numbered, tmp_path_factory) -> str:
    """A folder of shards, each of fewer images than a batch has."""
    folder = str(tmp_path_factory.mktemp("shards"))
    assert len(write_shards(numbered, folder, 0.003).sizes) == 22
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory, packed) -> PackedData:
    """Data of 12 MB: several times what a cache may hold."""
    return numbered_data(tmp_path_factory.mktemp("large") / "data", packed, 1000, 3, 64)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the cache is below the project


@pytest.fixture
def s3(seaweed, monkeypatch):  # noqa: F811
    for name, value in {**seaweed.environment, "AWS_MAX_ATTEMPTS": "2"}.items():
        monkeypatch.setenv(name, value)
    return seaweed


@functools.cache
def digits():
    return recipe_with([])


def plain(uri: str, batch_size: int = 64, seed: int = 0, **more):
    changes = {"trainer.batch_size": batch_size, "seed": seed, "augment.shift": 0.0, "trainer.stream": uri}
    return patch(digits(), changes | {name.replace("__", "."): value for name, value in more.items()})


def of(data, recipe, rank: int = 0, world: int = 1) -> StreamedBatches:
    return StreamedBatches(open_shards(recipe, data), data, recipe, CPU, Share(rank, world))


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() * 256 + images[:, 0, 0, 1]).tolist()


def all_of(batches: StreamedBatches) -> list[int]:
    return [number for images, _ in batches for number in numbers(images)]


@settings(max_examples=15)
@given(
    world=st.integers(1, 4),
    batch_size=st.integers(8, 700),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_image_comes_once_an_epoch_and_processes_share_them(
    shards, numbered, world, batch_size, epoch, seed
):
    recipe = plain(shards, batch_size, seed)
    parts = [of(numbered, recipe, rank, world) for rank in range(world)]
    for batches in parts:
        batches.begin_at(epoch, 0)
    divided = [[(numbers(images), labels.tolist()) for images, labels in part] for part in parts]
    assert sorted(n for rank in divided for own, _ in rank for n in own) == list(range(1000))
    labels = numbered.split("train").labels
    assert all(labels[own].tolist() == given for rank in divided for own, given in rank)
    assert {len(rank) for rank in divided} == {len(parts[0])}
    for position, together in enumerate(zip(*divided, strict=True)):
        sizes = [len(own) for own, _ in together]
        assert sum(sizes) == parts[0].size_of(position)
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=8)
@given(epoch=st.integers(0, 3), world=st.integers(1, 2), data=st.data())
def test_it_goes_on_at_any_batch(shards, numbered, epoch, world, data):
    recipe = patch(plain(shards), {"augment.shift": 0.2, "augment.flip": True})
    begun = of(numbered, recipe, world - 1, world)
    begun.begin_at(epoch, 0)
    whole = [*begun]
    first = data.draw(st.integers(0, len(whole) - 1))
    resumed = of(numbered, recipe, world - 1, world)
    resumed.begin_at(epoch, first)
    again = [*resumed]
    assert len(again) == len(whole) - first
    for (a, b), (c, d) in zip(whole[first:], again, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_batches_are_mixed_and_each_epoch_and_seed_has_its_order(shards, numbered):
    batches = of(numbered, plain(shards))
    assert min(len(set(labels.tolist())) for _, labels in [*batches][:-1]) >= 8
    orders = [all_of(batches), all_of(batches), all_of(of(numbered, plain(shards, seed=1)))]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert orders[0] != orders[1] != orders[2] != orders[0]
    again = of(numbered, plain(shards))
    again.begin_at(1, 0)
    assert all_of(again) == orders[0]


def test_the_command_writes_to_s3_and_the_cache_stays_within_its_bound(s3, large, tmp_path):
    uri = f"s3://{BUCKET}/sets/large"
    done = CliRunner().invoke(cli, ["shard", uri, "--data", str(large.path), "--shard-mb", "1"])
    assert done.exit_code == 0, done.output
    assert f"{uri}: 1,000 images of digits in 13 shards, 12.3 MB" in done.output
    written = set(s3.keys("sets/large/"))
    limit = 3_500_000  # three shards and a half
    recipe = plain(uri, trainer__stream_cache_gb=limit / 1e9)
    batches = of(large, recipe)
    folder = next((tmp_path / ".state/stream").glob("*/index.json")).parent
    most, orders = 0, []
    for stop in (None, 10, None):  # an epoch that is broken off leaves nothing in the way
        order = []
        for batch, (images, _) in enumerate(batches):
            order += numbers(images)
            most = max(most, held(folder))
            if batch == stop:
                break
        orders.append(order)
    assert 1_500_000 < most <= limit
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(1000))
    del batches
    assert not folder.exists()
    # The same as from a folder, and from S3 with room for all.
    write_shards(large, str(tmp_path / "folder"), 1)
    assert all_of(of(large, plain(str(tmp_path / "folder")))) == orders[0]
    roomy = of(large, plain(uri))
    assert all_of(roomy) == orders[0]
    folder = next((tmp_path / ".state/stream").glob("*/index.json")).parent
    assert len([*folder.glob("*.bin")]) == 13
    for key in written:
        s3.client().delete_object(Bucket=BUCKET, Key=key)
    roomy.begin_at(0, 0)
    assert all_of(roomy) == orders[0]  # of the disk alone
    with pytest.raises(UserError, match=r"trainer\.stream_cache_gb: 0\.001 is too little for the shards of"):
        StreamedBatches(shards_too_small(large, tmp_path), large, recipe, CPU)


def held(folder) -> int:
    size = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # LitData removes while one looks
            size += file.stat().st_size
    return size


def shards_too_small(large, tmp_path):
    uri = f"s3://{BUCKET}/again"
    write_shards(large, uri, 1)
    return open_shards(plain(uri, trainer__stream_cache_gb=0.001), large)


def test_s3_may_be_away_for_a_while_and_not_for_ever(large, monkeypatch, capfd):
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def started():
        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
        return server

    server = started()
    boto3.client("s3").create_bucket(Bucket="a-bucket")
    write_shards(large, "s3://a-bucket/large", 1)
    recipe = plain("s3://a-bucket/large", trainer__stream_cache_gb=0.0035)
    images = all_of(of(large, recipe))
    seen, back = [], []
    for batch, (own, _) in enumerate(of(large, recipe)):
        seen += numbers(own)
        if batch == 3:
            server.stop()
            threading.Timer(1.0, lambda: back.append(started())).start()
    assert seen == images
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    batches = iter(of(large, recipe))
    next(batches)
    back[0].stop()
    capfd.readouterr()
    with pytest.raises(
        UserError, match=r"^s3://a-bucket/large/chunk-\w+\.bin: Could not connect to the endpoint"
    ) as told:
        list(batches)
    assert "\n" not in str(told.value)
    assert "Traceback" not in capfd.readouterr().err


def test_other_missing_or_damaged_shards_are_named(s3, numbered, large, shards, tmp_path):
    with pytest.raises(UserError, match=r"holds shards of other data than the training split of .*: write them"):
        of(large, plain(shards))
    with pytest.raises(UserError, match=r"holds shards of other data .*: name another place"):
        write_shards(large, shards)
    with pytest.raises(UserError, match=r"nothing holds no shards \(no index\.json\): write them again with"):
        of(large, plain(f"s3://{BUCKET}/nothing"))
    with pytest.raises(UserError, match=r"http://.*: shards are in a folder or below"):
        of(large, plain("http://127.0.0.1/x"))
    uri = f"s3://{BUCKET}/s"
    write_shards(numbered, uri, 0.01)
    victim = next(key for key in s3.keys("s/") if key.endswith(".bin"))
    s3.put(victim, s3.read(victim)[:-1] + b"\xff")
    with pytest.raises(UserError, match=rf"{victim} is damaged \(its SHA-256 is not in its name\)"):
        all_of(of(numbered, plain(uri)))
    s3.client().delete_object(Bucket=BUCKET, Key=victim)
    with pytest.raises(UserError, match=rf"{victim} is missing: write them again"):
        all_of(of(numbered, plain(uri)))
    write_shards(numbered, uri, 0.01)  # what lacks is written again
    assert sorted(all_of(of(numbered, plain(uri)))) == list(range(1000))
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    text = (folder / "index.json").read_text()
    for old, new in (("chunk-", "../chunk-"), ('"bytes"', '"pickle"'), ('"chunks"', '"c"'), ("{", "")):
        (folder / "index.json").write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=r"copy/index\.json is damaged \(.*: write them again with"):
            of(numbered, plain(str(folder)))
    (folder / "index.json").write_text(text)
    next(folder.glob("chunk-*")).unlink()
    with pytest.raises(UserError, match=r"write them again with"):
        all_of(of(numbered, plain(str(folder))))


def test_an_interrupted_writing_is_not_taken_for_whole_and_goes_on(numbered, tmp_path):
    def cut(parts, count):
        yield from parts[: count // 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(numbered, str(tmp_path / "s"), 0.01, cut)
    before = {file: file.stat().st_ino for file in (tmp_path / "s").iterdir()}
    assert len(before) > 2
    assert read_index(place_of(str(tmp_path / "s"))) is None
    write_shards(numbered, str(tmp_path / "s"), 0.01)
    assert all(file.stat().st_ino == number for file, number in before.items())
    assert sorted(all_of(of(numbered, plain(str(tmp_path / "s"))))) == list(range(1000))


def test_a_follower_that_leaves_at_once_takes_its_cache_along(tmp_path):
    class Owner: ...

    owner, child = Owner(), os.fork()
    if child == 0:
        try:
            stream._own_folder(owner)
            follower._leave(75)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert [file.name for file in (tmp_path / ".state/stream").iterdir()] == ["lock"]


def test_a_fit_without_the_training_images_resumes_to_the_bit(s3, packed, tmp_path):
    uri = f"s3://{BUCKET}/digits"
    write_shards(packed, uri, 0.01)
    shutil.copytree(packed.path, tmp_path / "data", ignore=shutil.ignore_patterns("train", "test"))
    data = PackedData.open(tmp_path / "data")
    recipe = recipe_with([f"trainer.stream={uri}", "model.dropout=both", "augment.shift=0.1"])
    whole = fit(recipe, data, state_folder=tmp_path / "whole")
    assert whole.best["val/accuracy"] > 0.5
    with pytest.raises(Interrupted):
        fit(recipe, data, state_folder=tmp_path / "cut", callbacks=[SignalAt(30)])
    resumed = fit(recipe, data, state_folder=tmp_path / "cut")
    assert resumed.resumed_from == 30
    assert resumed.history == whole.history
    assert same(resumed.network, whole.network)
    # Diagnosis looks at a part.
    evidence = gather(whole.network, data, recipe, CPU)
    assert evidence.counts.tolist() == list(packed.meta.counts["train"])
    assert len(range_test(recipe, data, steps=10).loss) > 3
    with pytest.raises(UserError, match=r"trainer\.sequential_parts needs the data at hand"):
        fit(patch(recipe, {"trainer.sequential_parts": 2}), data, state_folder=tmp_path / "parts")


@pytest.mark.slow
def test_the_stages_train_and_evaluate_without_the_training_images(packed, tmp_path, store_db):
    write_shards(packed, str(tmp_path / "shards"), 0.01)
    out = tmp_path / "out"
    shutil.copytree(packed.path, out / "data/prepared", ignore=shutil.ignore_patterns("train"))
    tracked = (f"tracking.uri=sqlite:///{store_db}", f"tracking.spool={tmp_path}/spool")
    for stage, *overrides in (
        ("train", "trainer.max_epochs=3", f"trainer.stream={tmp_path / 'shards'}"),
        ("evaluate",),
    ):
        command = [sys.executable, "-P", "-m", f"cnn_tuning.stages.{stage}", "experiment=digits", *overrides]
        folders = ("--inputs", str(out), "--outputs", str(out))
        done = subprocess.run(
            [*command, *tracked, *folders], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "test images seen in training: not evaluated: no training images in " in done.stdout
    metrics = json.loads((out / "results/evaluation/metrics.json").read_text())
    assert metrics["baseline"]["test"]["accuracy"] > 0.5
    assert metrics["leak"]["not_evaluated"].startswith("no training images in ")
    assert "images" not in metrics["leak"]
    assert "not evaluated: no training images in " in (out / "results/evaluation/report.html").read_text()
