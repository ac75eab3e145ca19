"""Digests of files: a path and what is expected of it come in, its SHA-256 goes out or an error."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cnn_tuning.config import FileConfig
from cnn_tuning.errors import UserError

BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: FileConfig, name: str) -> str:
    """Return the file's SHA-256; raise `UserError` where size or a given digest differ."""
    size = path.stat().st_size
    if expected.bytes is not None and size != expected.bytes:
        raise UserError(f"{name}: {size} bytes, expected {expected.bytes}: truncated or altered")
    sha256 = hashlib.sha256()
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            if expected.md5:
                md5.update(block)
    found = {"sha256": sha256.hexdigest(), "md5": md5.hexdigest()}
    for kind, digest in (("sha256", expected.sha256), ("md5", expected.md5)):
        if digest and digest != found[kind]:
            raise UserError(f"{name}: hash mismatch: {kind} is {found[kind]}, expected {digest}")
    return found["sha256"]
