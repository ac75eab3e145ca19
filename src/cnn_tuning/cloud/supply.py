"""DVC from here: what a host is to pull goes to the remote before the launch, what it made comes back after."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from cnn_tuning.cloud.aws import hide_account
from cnn_tuning.cloud.runfolder import RunFolder
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


def check_reachable(url: str, bucket: str, prefix: str) -> None:
    """Refuse a remote that the hosts' role may not read: it may read below one prefix of one bucket."""
    allowed = f"s3://{bucket}/{prefix}/"
    if not f"{url.rstrip('/')}/".startswith(allowed):
        raise UserError(
            f"DVC's remote is {url}, and a host may read below {allowed} only: set host.bucket and host.prefix to "
            f"fit, or make one there with `cnn-tuning remote init {bucket} --force` (commit .dvc/config)"
        )


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


def push(region: str, folder: Path = Path()) -> int:
    """Push what the remote lacks of the outputs in dvc.lock; return how many files that were."""
    # DVC takes long to say why a remote does not answer.
    RunFolder.at(remote_url(folder), region, patient=False).check()
    return _count(_dvc(folder, "push"))


def pull(paths: list[str], folder: Path = Path()) -> int:
    """Pull outputs; return how many files were fetched."""
    return _count(_dvc(folder, "pull", *paths)) if paths else 0


def pull_apart(paths: list[str], lock: Path, target: Path, folder: Path = Path()) -> int:
    """Pull outputs that another dvc.lock names into a folder of their own; return how many files were fetched.

    The folder is a DVC project of one stage, with this project's remote and cache.
    """
    import yaml

    if not paths:
        return 0
    stages = yaml.safe_load(lock.read_text())["stages"].values()
    entries = [out for stage in stages for out in stage.get("outs", ()) if out["path"] in paths]
    _project_apart(folder, target)
    stage = {"cmd": "host", "outs": [entry["path"] for entry in entries]}
    (target / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"host": stage}}))
    named = {"schema": "2.0", "stages": {"host": {"cmd": "host", "outs": entries}}}
    (target / "dvc.lock").write_text(yaml.safe_dump(named))
    return _count(_dvc(target, "pull", "--force"))


def _project_apart(folder: Path, target: Path) -> None:
    """Make a DVC project, outside of Git, that has another one's remote and cache."""
    own, its = folder / ".dvc", target / ".dvc"
    its.mkdir(parents=True, exist_ok=True)
    config = configparser.ConfigParser(interpolation=None)
    config.read(own / "config")
    cache = config.get("cache", "dir", fallback="cache")
    config.read_dict({"core": {"no_scm": "true"}, "cache": {"dir": str((own / cache).resolve())}})
    with (its / "config").open("w") as file:
        config.write(file)
    (its / "config.local").unlink(missing_ok=True)
    if (own / "config.local").is_file():  # it may hold secrets: no second copy
        (its / "config.local").symlink_to((own / "config.local").resolve())


def _count(text: str) -> int:
    return sum(int(number) for number in _COUNT.findall(text))


def _dvc(folder: Path, *arguments: str) -> str:
    # Its progress bars are for people; what it counts goes to stdout.
    shown = sys.stderr.isatty()
    with tempfile.TemporaryFile("w+") as counted:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,  # a question that nobody sees would never be answered
            stdout=counted,
            stderr=subprocess.PIPE,
            env={**os.environ, **({"DVC_IGNORE_ISATTY": "1"} if shown else {})},
        )
        assert process.stderr is not None
        with process.stderr as stream:
            said = _filtered(stream, sys.stderr if shown else None)
        code = process.wait()
        counted.seek(0)
        text = counted.read()
    if code:
        lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if "ERROR" in line]
        raise UserError(f"dvc {arguments[0]}: {lines[-1] if lines else 'no reason given'}")
    return text


def _filtered(stream: IO[bytes], screen: TextIO | None) -> str:
    """Return what is said without secrets and account numbers, each piece on the screen as it comes."""
    said, rest = [], b""
    while chunk := os.read(stream.fileno(), 4096):
        # A progress bar ends its pieces with a carriage return.
        *pieces, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
        for piece in pieces:
            said.append(hide_account(piece.decode(errors="replace")))
            if screen is not None:
                screen.write(said[-1])
                screen.flush()
    said.append(hide_account(rest.decode(errors="replace")))
    if screen is not None:
        screen.write(said[-1])
    return "".join(said)
