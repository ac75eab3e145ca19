"""A folder of pictures in S3, on a real S3 server: copied, gone on with, checked, made an experiment."""

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from moto_server import clients_led_to_it
from PIL import Image
from project import ROOT

from cnn_tuning.cli import cli
from cnn_tuning.config import DataConfig, ImageConfig, SourceConfig, compose
from cnn_tuning.data.sources import fetch
from cnn_tuning.errors import UserError


@pytest.fixture(scope="module")
def s3():
    import boto3

    with clients_led_to_it():
        client = boto3.client("s3")
        yield client


@pytest.fixture
def bucket(s3, request):
    """A bucket of this test's own."""
    name = f"bucket-{abs(hash(request.node.name))}"
    s3.create_bucket(Bucket=name)
    return name


def png(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def fill(s3, bucket, prefix, classes=("a", "b"), count=10):
    files = {f"{c}/{i:02} ö#?.png": png(100 * n + i) for n, c in enumerate(classes) for i in range(count)}
    for name, data in files.items():
        s3.put_object(Bucket=bucket, Key=prefix + name, Body=data)
    return files


def configured(uri):
    source = SourceConfig(uri, region="us-east-1", unsigned=False)
    return DataConfig("made", "image_folder", {}, (source,), ImageConfig((8, 8), 3))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("ending", ["", "/"])
def test_all_below_the_prefix_is_copied(tmp_path, s3, bucket, ending):
    files = fill(s3, bucket, "my/photos/", count=70)
    for other in ("my/photos2/a/x.png", "my/photos/a/.hidden", "my/photos/a/", "other.png"):
        s3.put_object(Bucket=bucket, Key=other, Body=b"x" * (not other.endswith("/")))
    uri = f"s3://{bucket}/my/photos{ending}"
    assert fetch(configured(uri), tmp_path / "raw", cache=tmp_path / "cache") == {"": uri}
    assert contents(tmp_path / "raw") == files
    assert contents(tmp_path / "cache") == {}


def test_an_interrupted_copy_goes_on_with_what_is_lacking(tmp_path, s3, bucket):
    files = fill(s3, bucket, "p/")
    config = configured(f"s3://{bucket}/p/")
    listing = {e["Key"][2:]: e["ETag"] for e in s3.list_objects_v2(Bucket=bucket, Prefix="p/")["Contents"]}
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    # As an interruption leaves it: some files whole, one half, one of an object that has changed since.
    names = sorted(files)
    digest = hashlib.sha256(config.sources[0].uri.encode()).hexdigest()[:16]
    held = tmp_path / "cache" / f"{digest}-folder"
    for name in names[:3]:
        (held / name).parent.mkdir(parents=True, exist_ok=True)
        (held / name).write_bytes(b"#" * len(files[name]))  # recognisable: must be kept, not fetched again
    (held / names[3]).write_bytes(files[names[3]][:10])
    notes = {name: listing[name] for name in (*names[:2], names[3])} | {names[2]: '"another"'}
    held.with_suffix(".json").write_text(json.dumps(notes))
    (held / "gone.png").write_bytes(b"deleted in the bucket since")
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    kept = {name: b"#" * len(files[name]) for name in names[:2]}
    assert contents(tmp_path / "raw") == files | kept


@pytest.mark.parametrize("key", ["a/../../outside.png", "a//b.png", "a/\\b.png"])
def test_keys_that_are_no_file_names_are_refused(tmp_path, s3, bucket, key):
    fill(s3, bucket, "p/", count=1)
    s3.put_object(Bucket=bucket, Key=f"p/{key}", Body=b"x")
    with pytest.raises(UserError, match="cannot be a file of a folder"):
        fetch(configured(f"s3://{bucket}/p/"), tmp_path / "raw", cache=tmp_path / "cache")
    assert contents(tmp_path / "raw") == {} and not list(tmp_path.rglob("outside*"))


def test_reasons(tmp_path, s3, bucket):
    for uri, reason in ((f"s3://{bucket}/none/", "no objects"), ("s3://nobucket/x/", "NoSuchBucket")):
        with pytest.raises(UserError, match=reason):
            fetch(configured(uri), tmp_path / "raw", cache=tmp_path / "cache")


def test_init_from_s3_and_fetch_without_copying_twice(tmp_path, s3, bucket, monkeypatch):
    files = fill(s3, bucket, "flowers/")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["init", f"s3://{bucket}/flowers"], standalone_mode=False)
    assert done.exception is None and "20 readable pictures" in done.output
    data = compose(["experiment=flowers"], params=None).data
    assert data.sources[0].uri == f"s3://{bucket}/flowers/"
    monkeypatch.setattr("cnn_tuning.data.prefix._download", lambda *_: pytest.fail("copied again"))
    fetch(data, tmp_path / "raw")
    assert contents(tmp_path / "raw") == files
