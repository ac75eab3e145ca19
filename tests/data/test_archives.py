"""Extraction of ordinary archives (FAULTS 32 has the hostile ones)."""

import io
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_tuning.data.archives import extract, is_archive
from cnn_tuning.errors import UserError

FILES = {"a/1.txt": b"one", "a/b/2.txt": b"", "3.bin": bytes(range(256)) * 40}


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("empty")
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


KINDS = {".zip": zipped(FILES)} | {
    f".tar{suffix}": tarred(FILES, mode)
    for suffix, mode in (("", "w"), (".gz", "w:gz"), (".bz2", "w:bz2"), (".xz", "w:xz"))
}


@pytest.mark.parametrize("kind", KINDS)
def test_archives_come_out_whole(tmp_path, kind):
    archive = tmp_path / f"made{kind}"
    archive.write_bytes(KINDS[kind])
    assert is_archive(archive)
    extract(archive, tmp_path / "out")
    found = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert found == FILES and (tmp_path / "out" / "empty").is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {archive.name, "out"}


def test_long_names_and_unicode_survive(tmp_path):
    name = f"{'n' * 120}/ü/{'m' * 120}.txt"
    (tmp_path / "a.tar").write_bytes(tarred({name: b"x"}, "w"))
    extract(tmp_path / "a.tar", tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"x"


def test_a_folder_with_files_is_not_written_over(tmp_path):
    (tmp_path / "a.zip").write_bytes(KINDS[".zip"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_truncated_or_damaged_archives_leave_nothing(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("cut")
    damaged = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    (folder / "a").write_bytes(bytes(damaged[:cut]))
    try:
        extract(folder / "a", folder / "out")
    except UserError as error:
        assert "\n" not in str(error)
        assert [p.name for p in folder.iterdir()] == ["a"]
