"""Safe extraction: an untrusted zip or tar archive comes in, a new folder of plain files goes out."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from cnn_tuning.errors import UserError

MAX_BYTES = 64 << 30
MAX_FILES = 5_000_000
MAX_RATIO = 200.0

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# What a tar may hold besides its members' bytes: headers, padding, long names. The reader keeps in memory
# what stands before a member; all of it together grows with the members that were met.
_TAR_GAP = 1 << 20
_TAR_OVERHEAD_PER_FILE = 8192
# What zipfile and tarfile raise for bytes that are none of theirs.
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, struct.error),
    *(NotImplementedError, ValueError, RecursionError),
)


def is_archive(path: Path) -> bool:
    """Return whether the name is one that `extract` reads."""
    return path.name.lower().endswith(_SUFFIXES)


def extract(
    archive: Path,
    out: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    max_ratio: float = MAX_RATIO,
) -> None:
    """Extract into the new folder `out`, all or nothing.

    Refused with `UserError`: names that leave `out` (absolute, `..`, drive letters), links, devices, sparse
    and encrypted members, more than `max_files` entries, more than `max_bytes` in total or more than
    `max_ratio` times the archive's own size. Permissions and owners of the archive are not applied.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: extract {archive.name} into a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    limit = int(min(max_bytes, max_ratio * archive.stat().st_size))
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        budget = _Budget(archive.name, limit, max_files)
        if zipfile.is_zipfile(archive):
            _extract_zip(archive, work, budget)
        else:
            _extract_tar(archive, work, budget)
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        work.rename(out)
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{archive}: damaged or not a zip or tar archive ({reason})") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{archive}: refused: the same name appears twice") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # damaged bzip2 in a zip; a place before its begin
            raise UserError(f"{archive}: damaged or not a zip or tar archive ({error})") from None
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{archive}: refused: holds a name that is too long for this file system") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Budget:
    """Counts members and bytes; `refuse` names the archive and the reason."""

    def __init__(self, name: str, limit: int, max_files: int) -> None:
        self.name, self.limit, self.max_files = name, limit, max_files
        self.files = self.bytes = 0

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self.name}: refused: {reason}")

    def add(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        if self.files > self.max_files:
            raise self.refuse(f"more than {self.max_files} entries")
        if self.bytes > self.limit:
            raise self.refuse(f"unpacks to more than {self.limit} bytes (an archive bomb?)")

    def place(self, name: str, work: Path) -> Path:
        """Return where a member goes, inside `work` and nowhere else."""
        parts = re.split(r"[/\\]", name)
        if not name or "\0" in name or parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", name):
            raise self.refuse(f"{name!r} points outside the folder")
        return work.joinpath(*(p for p in parts if p not in ("", ".")))


def _extract_zip(archive: Path, work: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as file:
        places = []
        for info in file.infolist():
            budget.add(info.file_size)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise budget.refuse(f"{info.filename!r} is a link or a device")
            if info.flag_bits & 1:
                raise budget.refuse(f"{info.filename!r} is encrypted")
            places.append((info, budget.place(info.filename, work)))
        for info, place in places:
            if info.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                # zipfile stops at the declared size and checks the CRC, so the sum above holds.
                with file.open(info) as source:
                    _write(source, place)


def _extract_tar(archive: Path, work: Path, budget: _Budget) -> None:
    with _decompressed(archive) as stream:
        capped = _Capped(stream, budget)
        with tarfile.open(fileobj=capped, mode="r|", errorlevel=2) as file:
            while (member := file.next()) is not None:
                file.members.clear()  # type: ignore[attr-defined]  # all names would stay in memory
                size = member.size if member.isreg() else 0
                budget.add(size)
                capped.member(size)
                place = budget.place(member.name, work)
                if member.isdir():
                    place.mkdir(parents=True, exist_ok=True)
                elif member.isreg() and not member.issparse():
                    source = file.extractfile(member)
                    assert source is not None
                    _write(source, place)
                else:
                    raise budget.refuse(f"{member.name!r} is a link, a device or a sparse file")
        # To the end, where gzip, bzip2 and xz keep their checksums: tarfile stops before them.
        while capped.read():
            pass
        if budget.files == 0:
            raise tarfile.ReadError("no members")


@contextmanager
def _decompressed(archive: Path) -> Iterator[IO[bytes]]:
    with archive.open("rb") as raw:
        head = raw.read(6)
        raw.seek(0)
        if head.startswith(b"\x1f\x8b"):
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif head.startswith(b"BZh"):
            yield bz2.BZ2File(raw)
        elif head == b"\xfd7zXZ\x00":
            yield lzma.LZMAFile(raw)  # noqa: SIM115 (closed with `raw`)
        else:
            yield raw


class _Capped(io.RawIOBase):
    """A tar's stream, which ends in a refusal where it holds more than the members met so far account for."""

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream, self._budget = stream, budget
        self._taken, self._until = 0, _TAR_GAP

    def member(self, size: int) -> None:
        """Let the bytes of a member pass, whose head was just read."""
        earned = self._budget.bytes + _TAR_OVERHEAD_PER_FILE * self._budget.files
        self._until = min(self._taken + size, earned) + _TAR_GAP

    def read(self, size: int = -1) -> bytes:
        size = 1 << 16 if size < 0 else size
        try:
            data = self._stream.read(size)
        except (OSError, ValueError) as error:
            raise tarfile.ReadError(str(error)) from None
        self._taken += len(data)
        if self._taken > self._until:
            raise self._budget.refuse("its headers unpack to more than a member's may (an archive bomb?)")
        return data


def _write(source: IO[bytes], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
