"""Row 32: image bombs, zip bombs, path traversal, links in archives: refused, nothing written outside."""

import io
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_tuning.config import ImageConfig
from cnn_tuning.data.archives import extract
from cnn_tuning.data.images import BadImage, to_input
from cnn_tuning.errors import UserError

ABSOLUTE = Path("/tmp/canary-of-an-archive")
LIMITS = {"max_bytes": 1 << 20, "max_files": 10, "max_ratio": 50.0}


@pytest.fixture
def place(tmp_path):
    """A folder to extract into, with a canary beside it that must stay as it is."""
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "canary").write_text("alive")
    return tmp_path / "around" / "out"


def refused(archive, place, message, **limits):
    with pytest.raises(UserError, match=message) as caught:
        extract(archive, place, **(LIMITS | limits))
    assert archive.name in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name for p in place.parent.iterdir()} == {"canary"}, "nothing is left, inside or outside"
    assert (place.parent / "canary").read_text() == "alive"
    assert {p.name for p in place.parent.parent.iterdir()} == {"around", archive.name}
    assert not ABSOLUTE.exists()


def tar_of(tmp_path, *members, mode="w:gz"):
    path = tmp_path / "hostile.tar.gz"
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


OUTSIDE = [
    "../canary",
    "a/../../canary",
    str(ABSOLUTE),
    "..\\canary",
    "C:\\canary",
    "C:canary",
    "\\canary",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tar_that_points_outside(tmp_path, place, name):
    archive = tar_of(tmp_path, (member("fine.txt"), b"fine"), (member(name), b"evil"))
    with tarfile.open(archive) as made:
        assert made.getnames()[-1] == name
    refused(archive, place, "outside the folder")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_zip_that_points_outside(tmp_path, place, name):
    path = tmp_path / "hostile.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fine.txt", "fine")
        archive.writestr(zipfile.ZipInfo(name), "evil")
    assert zipfile.ZipFile(path).namelist()[-1] == name
    refused(path, place, "outside the folder")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path, place, kind):
    archive = tar_of(tmp_path, (member("way-out", kind, ".."), b""), (member("way-out/canary"), b"evil"))
    with tarfile.open(archive) as made:
        assert not made.getmembers()[0].isfile()
    refused(archive, place, "is a link, a device")


def test_a_link_in_a_zip(tmp_path, place):
    path = tmp_path / "hostile.zip"
    info = zipfile.ZipInfo("way-out")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "..")
        archive.writestr("way-out/canary", "evil")
    refused(path, place, "is a link or a device")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_by_size_by_ratio_and_by_count(tmp_path, place, kind):
    def made(name, files):
        if kind == "tar":
            return tar_of(tmp_path, *((member(n), d) for n, d in files.items()))
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for n, d in files.items():
                archive.writestr(n, d)
        return path

    bomb = made("hostile.zip", {f"{i}": bytes(3 << 20) for i in range(4)})
    assert bomb.stat().st_size < 100_000, "megabytes in a few kilobytes"
    refused(bomb, place, "archive bomb", max_ratio=1e9)
    refused(bomb, place, "archive bomb", max_bytes=1 << 40)
    bomb.unlink()
    many = made("hostile.zip", {f"{i}": b"" for i in range(11)})
    refused(many, place, "more than 10 entries", max_ratio=1e9)


def test_a_zip_whose_header_lies_about_the_size(tmp_path, place):
    path = tmp_path / "hostile.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0", bytes(8 << 20))
    data = path.read_bytes()
    lie = data.replace(struct.pack("<I", 8 << 20), struct.pack("<I", 100))
    assert lie != data
    path.write_bytes(lie)
    refused(path, place, "damaged|bomb")


def test_a_tar_bomb_in_its_own_long_name_header(tmp_path, place):
    """The name of a member may be gigabytes long: what the reader takes in for itself is limited too."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 64 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    path = tmp_path / "hostile.tar.gz"
    with path.open("wb") as file:
        file.write(packer.compress(info.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(64):
            file.write(packer.compress(b"n" * (1 << 20)))
        file.write(packer.flush())
    assert path.stat().st_size < 1 << 20
    refused(path, place, "bomb")


def long_header(kind, size):
    """The blocks of a GNU long name, or of a PAX header, that is as long as a file."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    yield info.tobuf(tarfile.GNU_FORMAT)
    yield from (b"n" * (1 << 20) for _ in range(size >> 20))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("before", [0, 1500])
def test_a_long_header_is_not_taken_in_by_default_limits(tmp_path, place, kind, before):
    """Also not where the members before it were many."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    path = tmp_path / "hostile.tar.gz"
    with path.open("wb") as file:
        for number in range(before):
            file.write(packer.compress(tarfile.TarInfo(f"{number}").tobuf(tarfile.GNU_FORMAT)))
        for block in long_header(kind, 64 << 20):
            file.write(packer.compress(block))
        file.write(packer.flush())
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(UserError, match="bomb"):
        extract(path, place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, "of 64 MiB that tarfile, which keeps headers as Python's bytes, wanted"
    assert {p.name for p in place.parent.iterdir()} == {"canary"}


def test_a_name_too_long_for_the_disk_and_headers_without_end(tmp_path, place):
    refused(tar_of(tmp_path, (member("n" * 300), b"x")), place, "name that is too long", max_ratio=1e9)
    chain = b"".join(
        tarfile.TarInfo.tobuf(info, tarfile.GNU_FORMAT) + bytes(512)
        for info in [member("././@LongLink", tarfile.GNUTYPE_LONGNAME)] * 900
        if not setattr(info, "size", 1)
    )
    path = tmp_path / "hostile.tar.gz"
    path.write_bytes(zlib.compress(chain, wbits=31))
    refused(path, place, "damaged", max_ratio=1e9)


def test_an_encrypted_zip(tmp_path, place):
    path = tmp_path / "hostile.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"secret")
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(bytes(data))
    refused(path, place, "is encrypted")


def png_bomb(width, height):
    """A valid PNG header of any size over a few hundred bytes of data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_bomb_is_refused_by_its_header(size):
    bomb = png_bomb(*size)
    assert len(bomb) < 300
    if size[0] < 13_000:
        assert Image.open(io.BytesIO(bomb)).size == size, "the header is a real one"
    with pytest.raises(BadImage, match="limit"):
        to_input(bomb, ImageConfig((28, 28), 1))


# Prints what becomes of each file, and by how many MiB at most the process grew: Pillow's memory is not Python's,
# and ru_maxrss of a new process begins with that of its parent.
GROWTH = """
import re, sys
from pathlib import Path
from cnn_tuning.config import ImageConfig
from cnn_tuning.data.images import BadImage, to_input
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
def outcome(data, **limit):
    try:
        to_input(data, ImageConfig((28, 28), 1), **limit)
        return "decoded"
    except BadImage as error:
        return str(error)
outcome(b"?")
before = peak()
for path in sys.argv[2:]:
    print(outcome(Path(path).read_bytes(), max_pixels=int(sys.argv[1])))
print(peak() - before)
"""


def growth(most, *paths):
    done = subprocess.run([sys.executable, "-c", GROWTH, str(most), *paths], capture_output=True, text=True)
    *outcomes, mebibytes = done.stdout.splitlines()
    return outcomes, int(mebibytes)


def test_a_whole_bomb_is_not_decoded_before_it_is_refused(tmp_path):
    """Pictures of 20 megapixels that are all there, so that a decoder could take them in."""
    image = Image.new("L", (5000, 4000), 7)
    kinds: dict = {kind: {} for kind in ("PNG", "JPEG", "GIF")}
    kinds |= {"TIFF": {"compression": "tiff_deflate"}, "WEBP": {"method": 0}, "AVIF": {"speed": 10}}
    for kind, options in kinds.items():
        image.save(tmp_path / kind, kind, **options)
    png = (tmp_path / "PNG").read_bytes()
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 8, len(png), 22)
    (tmp_path / "ICO").write_bytes(head + png)
    assert Image.open(tmp_path / "ICO").format == "ICO", "Pillow itself would take it, and decode it on opening"
    outcomes, grown = growth(1_000_000, *(tmp_path / kind for kind in [*kinds, "ICO"]))
    assert all("5000×4000 pixels, more than the limit" in outcome for outcome in outcomes[:-1]), outcomes
    assert "not an image of a known format" in outcomes[-1]
    assert grown < 10, "nothing is decoded"
    outcomes, grown = growth(100_000_000, tmp_path / "PNG")
    assert outcomes == ["decoded"] and grown > 17, "the measure shows it where it is"


def test_the_limit_is_about_the_picture_not_the_array():
    assert to_input(np.zeros((100, 100), np.uint8), ImageConfig((28, 28), 1), max_pixels=10_000).shape == (
        1,
        28,
        28,
    )
