"""The code as it stands, uncommitted changes included, as a Git bundle in the bucket; the host checks it out."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.cloud.aws import telling
from cnn_tuning.errors import UserError
from cnn_tuning.snapshots import AS_MAKER


@dataclass(frozen=True)
class Snapshot:
    """A commit that holds the working tree. `changed`: it is not the one that HEAD is at."""

    commit: str
    changed: bool


def snapshot(folder: Path, instead: Mapping[str, str] | None = None) -> Snapshot:
    """Return a commit of the working tree; branches, index and files of the repository stay as they are.

    `instead`: other texts that files of `folder` are to have in it.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if _git(folder, "rev-parse", "--is-shallow-repository") == "true":
        raise UserError("this is a shallow clone, which a host cannot fetch: `git fetch --unshallow`")
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}
        _git(folder, "read-tree", "HEAD", env=index)
        _git(folder, "add", "--all", ":/", env=index)
        for name, text in (instead or {}).items():
            made = _git(folder, "hash-object", "-w", "--stdin", text=text)
            path = _git(folder, "rev-parse", "--show-prefix") + name
            _git(folder, "update-index", "--add", "--cacheinfo", f"100644,{made},{path}", env=index)
        tree = _git(folder, "write-tree", env=index)
    if tree == _git(folder, "rev-parse", "HEAD^{tree}"):
        return Snapshot(head, changed=False)
    message = "The working tree, as it went to a host"
    return Snapshot(_git(folder, "commit-tree", tree, "-p", head, "-m", message, env=AS_MAKER), changed=True)


def bundle(folder: Path, commit: str, run: str, target: Path) -> None:
    """Write a bundle of a commit and its history."""
    reference = f"refs/cnn-tuning/{run}"
    _git(folder, "update-ref", reference, commit)
    try:
        _git(folder, "bundle", "create", str(target.resolve()), reference)
    finally:
        _git(folder, "update-ref", "-d", reference)


def upload(s3: Any, folder: Path, commit: str, run: str, bucket: str, prefix: str) -> None:
    """Put the bundle where the host looks for it."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "code.bundle"
        bundle(folder, commit, run, file)
        with telling(f"upload to bucket {bucket}"):
            s3.put_object(Bucket=bucket, Key=f"{prefix}/runs/{run}/code.bundle", Body=file.read_bytes())


def _git(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, text: str | None = None) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**os.environ, **(env or {})},
        input=text,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"git {arguments[0]}: {reason}: hosts run what is in a Git repository with a commit")
    return done.stdout.strip()
