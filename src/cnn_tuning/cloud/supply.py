"""DVC from here: what a host is to pull goes to the remote before the launch, what it made comes back after."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.cloud.aws import hide_account
from cnn_tuning.errors import UserError

DVC_LOCK = Path("dvc.lock")
_COUNT = re.compile(r"(\d+) files? (?:pushed|fetched)")


@dataclass(frozen=True)
class Out:
    """An output that DVC keeps: its path, and its bytes as dvc.lock says them."""

    path: str
    size: int


def remote_url(folder: Path) -> str:
    """Return the address of DVC's remote, which a host must find in the repository and reach.

    Raises:
        UserError: there is none, it is not in S3, or only this machine's settings know it.
    """
    config = configparser.ConfigParser(interpolation=None)
    config.read(folder / ".dvc/config")
    name = config.get("core", "remote", fallback="")
    # DVC puts the whole name of a remote's section in single quotes.
    sections = {section.strip("'"): section for section in config.sections()}
    url = config.get(sections.get(f'remote "{name}"', ""), "url", fallback="")
    if not url:
        raise UserError(
            "DVC has no default remote in .dvc/config, and a host gets its data from there: "
            "`cnn-tuning remote init BUCKET` makes one"
        )
    if not url.startswith("s3://"):
        raise UserError(
            f"DVC's remote {name} is {url}, which a host cannot reach: `cnn-tuning remote init BUCKET`"
        )
    return url


def outs(lock: Path = DVC_LOCK) -> list[Out]:
    """Return what dvc.lock says that DVC keeps, in its order."""
    import yaml

    try:
        told = yaml.safe_load(lock.read_text()) if lock.is_file() else {}
    except yaml.YAMLError:
        raise UserError(f"{lock} is damaged: `git checkout {lock}`, or `dvc repro`") from None
    found: dict[str, Any] = {}
    for stage in (told or {}).get("stages", {}).values():
        found |= {out["path"]: out for out in stage.get("outs", []) if out["path"] != "params.lock.yaml"}
    return [Out(path, int(out.get("size", 0))) for path, out in found.items()]


def push(folder: Path = Path()) -> int:
    """Push what the remote lacks of the outputs in dvc.lock; return how many files that were."""
    return _count(_dvc(folder, "push"))


def pull(paths: list[str], folder: Path = Path()) -> int:
    """Pull outputs; return how many files were fetched."""
    return _count(_dvc(folder, "pull", *paths)) if paths else 0


def _count(text: str) -> int:
    return sum(int(number) for number in _COUNT.findall(text))


def _dvc(folder: Path, *arguments: str) -> str:
    # Its progress bars are for people; what it counts goes to stdout.
    shown = None if sys.stderr.isatty() else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,  # a question that nobody sees would never be answered
        stdout=subprocess.PIPE,
        stderr=shown,
        text=True,
    )
    if done.returncode:
        lines = [line.removeprefix("ERROR: ") for line in (done.stderr or "").splitlines() if "ERROR" in line]
        reason = hide_account(lines[-1] if lines else "see above")
        raise UserError(f"dvc {arguments[0]}: {reason}")
    return done.stdout
