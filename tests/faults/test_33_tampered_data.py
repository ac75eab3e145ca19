"""Row 33: a tampered download or CIFAR pickle is a hash mismatch before anything is parsed."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from functools import partial

import numpy as np
import pytest

from cnn_tuning.config import DataConfig, FileConfig, ImageConfig, SourceConfig
from cnn_tuning.data.formats import read
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.sources import fetch
from cnn_tuning.errors import UserError

NAME = "cifar-10-python.tar.gz"


class MakesAFolder:
    """Unpickled by an ordinary unpickler, it leaves a canary, a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(*extra):
    """The official layout with small batches; `extra` goes into the first one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
            data = np.random.default_rng(i).integers(0, 256, (20, 3072), dtype=np.uint8)
            batch = {b"data": data, b"labels": [n % 10 for n in range(20)]}
            if i == 0 and extra:
                batch[b"extra"] = list(extra)
            body = pickle.dumps(batch, 2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def configured(data, *sources, **digests):
    digests = digests or {"sha256": hashlib.sha256(data).hexdigest()}
    names = tuple("abcdefghij")
    image = ImageConfig((32, 32), 3)
    return DataConfig(
        "made", "cifar_python", {NAME: FileConfig(**digests)}, sources, image, names, val_fraction=0.2
    )


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["sha256", "md5"])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_altered_byte_of_a_download(tmp_path, web, kind, place):
    good = archive()
    bad = bytearray(good)
    bad[place] ^= 1
    assert len(bad) == len(good) and bytes(bad) != good
    folder, uri = web
    (folder / NAME).write_bytes(bytes(bad))
    config = configured(good, SourceConfig(uri), **{kind: hashlib.new(kind, good).hexdigest()})
    with pytest.raises(UserError, match=f"hash mismatch: {kind}"):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    left = [p for folder in ("raw", "cache") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert left == [], "nothing of it stays"


@pytest.mark.parametrize("place", ["head", "middle", "sum", "size", "content"])
def test_one_altered_byte_of_a_download_that_is_gunzipped(tmp_path, web, capsys, place):
    """As MNIST comes: the digest is that of what was unpacked. In `content` the altered file is a good .gz."""
    good = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    folder, uri = web
    config = dataclasses.replace(
        configured(b""),
        files={"images": FileConfig(sha256=hashlib.sha256(good).hexdigest(), bytes=len(good))},
        sources=(SourceConfig(uri, suffix=".gz", convert="gunzip"),),
    )
    packed = gzip.compress(good)
    (folder / "images.gz").write_bytes(packed)
    assert fetch(config, tmp_path / "whole", cache=tmp_path / "cache") == {"images": f"{uri}images.gz"}
    assert (tmp_path / "whole/images").read_bytes() == good
    bad = bytearray(good if place == "content" else packed)
    bad[{"head": 0, "middle": len(bad) // 2, "sum": -8, "size": -1, "content": 100}[place]] ^= 1
    (folder / "images.gz").write_bytes(gzip.compress(bad) if place == "content" else bad)
    capsys.readouterr()
    with pytest.raises(UserError, match="no source of data set made gave images"):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    # The server of this test tells of its requests there too.
    [told] = [line for line in capsys.readouterr().err.splitlines() if '] "GET /' not in line]
    assert told.startswith(f"fetch: {uri}: ")
    assert "hash mismatch" in told or place != "content"
    left = [p for folder in ("raw", "cache") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert left == [], "nothing of it stays"


def test_the_next_source_is_asked(tmp_path, web, capsys):
    good = archive()
    folder, uri = web
    for name, data in (("bad", good[:-1] + b"x"), ("good", good)):
        (folder / name).mkdir()
        (folder / name / NAME).write_bytes(data)
    config = configured(good, SourceConfig(f"{uri}bad/"), SourceConfig(f"{uri}good/"))
    assert fetch(config, tmp_path / "raw", cache=tmp_path / "cache") == {NAME: f"{uri}good/{NAME}"}
    assert f"{uri}bad/: {NAME}: hash mismatch" in capsys.readouterr().err


def test_a_tampered_raw_file_is_not_unpickled(tmp_path):
    """Altered after the download: the digest is checked again before the archive is opened."""
    canary = tmp_path / "canary"
    good, evil = archive(), archive(MakesAFolder(canary))
    with tarfile.open(fileobj=io.BytesIO(evil)) as file:
        pickle.load(file.extractfile("cifar-10-batches-py/data_batch_1"))
    assert canary.exists(), "the pickle does what it should not"
    canary.rmdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / NAME).write_bytes(evil)
    with pytest.raises(UserError, match="hash mismatch"):
        prepare(configured(good), tmp_path / "raw", tmp_path / "out", seed=0)
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_an_evil_pickle_with_the_right_digest_is_refused(tmp_path):
    canary = tmp_path / "canary"
    evil = archive(MakesAFolder(canary))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / NAME).write_bytes(evil)
    with pytest.raises(UserError, match=r"data_batch_1: refused: the pickle asks for posix\.mkdir"):
        prepare(configured(evil), tmp_path / "raw", tmp_path / "out", seed=0)
    assert not canary.exists()


@pytest.mark.parametrize(
    "target",
    [("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy", "memmap")],
)
def test_no_other_name_is_found(tmp_path, target):
    module, name = target
    body = f"c{module}\n{name}\n.".encode()
    files = {n: FileConfig() for n in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}
    (tmp_path / "raw").mkdir()
    for file in files:
        (tmp_path / "raw" / file).write_bytes(body)
    assert callable(pickle.loads(body))
    config = dataclasses.replace(configured(b""), files=files)
    with (
        pytest.raises(UserError, match=f"refused: the pickle asks for {module}.{name}"),
        read(config, tmp_path / "raw"),
    ):
        pass


def test_the_untouched_archive_is_fine(tmp_path):
    good = archive()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / NAME).write_bytes(good)
    meta = prepare(configured(good), tmp_path / "raw", tmp_path / "out", seed=0)
    assert meta.shape == (3, 32, 32) and {k: sum(v) for k, v in meta.counts.items()} == {
        "train": 80,
        "val": 20,
        "test": 20,
    }
