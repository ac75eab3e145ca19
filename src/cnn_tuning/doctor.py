"""`cnn-tuning doctor`: is this machine ready? One line a check, with what to do where it is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnn_tuning.machine import usable_cores

NEEDED_GB = 2
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One finding; `fine` None means that it is only worth knowing."""

    about: str
    fine: bool | None
    found: str
    remedy: str = ""


def print_checks(*, locks: bool = False) -> bool:
    """Print all checks; return whether nothing is wrong. `locks`: only what is to be said of DVC's lock files."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    of_locks = (_lock_file, _at_work)
    of_all = (_python, _disk, _processor, _gpu, _tracking, _remote, *of_locks, _git)
    checks = [check() for check in (of_locks if locks else of_all)]
    if locks:
        checks = [check for check in checks if check.fine is not True]
    marks = {True: "[green]ok  [/]", False: "[red]bad [/]", None: "[dim]note[/]"}
    for check in checks:
        remedy = f": {check.remedy}" if check.remedy else ""
        console.print(f"{marks[check.fine]} {check.about:<15} {check.found}{remedy}")
    return all(check.fine is not False for check in checks)


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= OLDEST_PYTHON
    return Check("Python", fine, found, "" if fine else "3.11 or newer is needed")


def _disk() -> Check:
    free = shutil.disk_usage(".").free / 1e9
    fine = free > NEEDED_GB
    return Check("disk", fine, f"{free:.0f} GB free here", "" if fine else f"{NEEDED_GB} GB are needed")


def _processor() -> Check:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return Check("processor", True, f"{usable_cores()} cores, {memory:.0f} GiB of memory")


def _gpu() -> Check:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found = f"{pynvml.nvmlDeviceGetName(handle)}, driver {pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError as error:
        return Check("GPU", None, f"none ({error})", "training uses the processor")
    import torch

    if torch.cuda.is_available():
        return Check("GPU", True, f"{found}, CUDA {torch.version.cuda}")
    return Check("GPU", False, found, f"torch {torch.__version__} cannot use it: update the driver")


def _tracking() -> Check:
    from cnn_tuning.config import compose
    from cnn_tuning.tracking.store import problem_of, tracking_uri

    return _attempt("tracking", lambda: (tracking_uri(compose().tracking), problem_of))


def _attempt(about: str, find: Callable[[], tuple[str, Callable[[str], str | None]]]) -> Check:
    from cnn_tuning.errors import UserError

    try:
        uri, problem_of = find()
        problem = problem_of(uri)
    except UserError as error:
        return Check(about, False, " ".join(str(error).split()))
    from cnn_tuning.errors import redact

    return Check(about, problem is None, redact(uri), problem or "")


def _remote() -> Check:
    from dvc.config import Config, ConfigError

    if not Path(".dvc").is_dir():
        return Check("data remote", False, "no DVC project here", "run this in the project's top folder")
    try:
        config = Config(".dvc")
    except ConfigError as error:
        return Check("data remote", False, str(error))
    name = config["core"].get("remote")
    if not name:
        return Check(
            "data remote", None, "none set", "`dvc remote add -d storage s3://BUCKET/PREFIX` to share data"
        )
    command = [sys.executable, "-m", "dvc", "status", "--cloud"]
    if name not in config.get("remote", {}):
        return Check(
            "data remote", False, name, "core.remote names a remote that is not there: see `dvc remote list`"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return Check("data remote", False, config["remote"][name]["url"], "no answer within 60 s")
    # What follows an error is where to ask for help.
    said = [line[7:] for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    problem = "; ".join(said) or "`dvc status --cloud` fails" if done.returncode else ""
    return Check("data remote", not problem, config["remote"][name]["url"], problem)


def _lock_file() -> Check:
    """Look at what `dvc repro` has finished: a full disk or a kill can leave the file empty or cut."""
    import yaml

    path = Path("dvc.lock")
    if not path.exists():
        return Check("dvc.lock", True, "none yet")
    try:
        stages = yaml.safe_load(path.read_text())["stages"]
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
        remedy = "`git checkout dvc.lock`; where none is committed remove it, DVC knows again what it has computed"
        return Check("dvc.lock", False, "damaged", remedy)
    return Check("dvc.lock", True, f"{len(stages)} stages")


def _at_work() -> Check:
    """Look at who holds DVC's locks; those of dead processes it lets go by itself."""
    import psutil

    path = Path(".dvc/tmp/rwlock")
    try:
        held = json.loads(path.read_text())
        infos = [*held.get("write", {}).values(), *(i for many in held.get("read", {}).values() for i in many)]
        holders = sorted({(info["pid"], info["cmd"]) for info in infos if psutil.pid_exists(info["pid"])})
    except FileNotFoundError:
        holders = []
    except (ValueError, TypeError, KeyError, AttributeError):
        return Check("DVC's lock", False, f"{path} is damaged", f"once no `dvc` runs here: `rm {path}`")
    if not holders:
        return Check("DVC's lock", True, "free")
    named = ", ".join(f"process {pid} ({command})" for pid, command in holders)
    return Check("DVC's lock", None, f"held by {named}", "wait for it, or end it")


def _git() -> Check:
    done = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True)
    if done.returncode:
        return Check("Git", False, "no repository here", "`git init` and commit: runs record their commit")
    changed = len(done.stdout.splitlines())
    return Check("Git", True if not changed else None, f"{changed} uncommitted changes" if changed else "clean")
