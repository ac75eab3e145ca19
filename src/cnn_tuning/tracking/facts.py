"""Facts about where a run happens: commit and dirty files, packages, processor, GPU; as flat tags."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cnn_tuning.machine import usable_cores
from cnn_tuning.snapshots import MAKER

PACKAGES = ("cnn-tuning", "torch", "torchvision", "pytorch-lightning", "numpy", "mlflow", "timm", "dvc")
# `dvc repro` rewrites it while the stages run: it says nothing about the code.
NOT_CODE = (":(exclude)dvc.lock",)


def gather() -> dict[str, str]:
    """Return the facts that are logged as tags with every run (about 30 ms, no heavy import)."""
    return {**_code(), **_packages(), **_machine(), **_gpus()}


def code_of(tags: Mapping[str, str]) -> tuple[str, bool]:
    """Return the commit that a run's code is of, and whether it had uncommitted changes.

    A snapshot, clean where it runs, is the commit that it was made of, with uncommitted changes.
    """
    made_of = tags.get("git.snapshot_of", "")
    return made_of or tags.get("git.commit", "none"), bool(made_of) or tags.get("git.dirty") == "true"


def code_text(tags: Mapping[str, str]) -> str:
    """Return the commit and the changes to it as a person reads them."""
    parts = [code_of(tags)[0]]
    parts += ["with uncommitted changes"] if "git.snapshot_of" in tags else []
    parts += [f"with changes in {tags['git.dirty_files']}"] if "git.dirty_files" in tags else []
    return ", ".join(parts)


def _code() -> dict[str, str]:
    tags = {"mlflow.source.name": _program(), "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {**tags, "git.commit": "none"}
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *NOT_CODE).splitlines()
    maker, _, parent = _git("log", "-1", "--format=%ce %P").partition(" ")
    files = ", ".join(line.split(maxsplit=1)[1] for line in changed[:10])
    return {
        **tags,
        "mlflow.source.git.commit": commit,
        "git.commit": commit,
        "git.dirty": "true" if changed else "false",
        **({"git.snapshot_of": parent} if maker == MAKER and parent else {}),
        **({"git.dirty_files": files + (", …" if len(changed) > 10 else "")} if changed else {}),
    }


def _packages() -> dict[str, str]:
    tags = {"package.python": platform.python_version()}
    for name in PACKAGES:
        try:
            tags[f"package.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return tags


def _machine() -> dict[str, str]:
    import psutil

    return {
        "hardware.cpu": _cpu_model(),
        "hardware.cores": str(usable_cores()),
        "hardware.memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
        "hardware.system": f"{platform.system()} {platform.machine()}",
        **_instance(),
    }


def _instance(firmware: Path = Path("/sys/devices/virtual/dmi/id")) -> dict[str, str]:
    """Return the type of an EC2 host: Nitro's firmware tells it without a question to the metadata service."""
    try:
        if (firmware / "sys_vendor").read_text().strip() != "Amazon EC2":
            return {}
        return {"hardware.instance": (firmware / "product_name").read_text().strip()}
    except OSError:
        return {}


def _gpus() -> dict[str, str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        names = [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))
            for i in range(pynvml.nvmlDeviceGetCount())
        ]
        return {
            "hardware.gpu": ", ".join(sorted(set(names))) or "none",
            "hardware.gpus": str(len(names)),
            "hardware.gpu_driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    except Exception:  # no package, no driver, no permission: all mean that no GPU is used
        return {"hardware.gpu": "none"}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""


def _program() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec else Path(sys.argv[0] or "python").name


def _user() -> str:
    if os.environ.get("MLFLOW_TRACKING_USERNAME"):  # whom the team's server knows
        return os.environ["MLFLOW_TRACKING_USERNAME"]
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
