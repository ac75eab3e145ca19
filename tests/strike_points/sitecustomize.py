"""Lets a test strike a stage at one point: Python imports this at its start where it is on PYTHONPATH.

STRIKE_STAGE names the stage, STRIKE_AT the point: `train 5` and `eval 1` are the n-th forward pass (the process
says in STRIKE_FOLDER/here that it is there and waits for STRIKE_FOLDER/go), any other one of `DEATHS`: the
process ends there as by kill -9, in the writing of its n-th checkpoint. Nothing of the product is replaced.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

# Audit event, and what its first argument has in its name.
DEATHS = {
    "open": ("open", "step-"),
    "byte": ("open", "step-"),
    "rename": ("os.rename", "step-"),
    "manifest": ("open", "checkpoints.partial"),
    "manifest-rename": ("os.rename", "checkpoints.partial"),
}


def wait_at_forward(mode: str, number: int, folder: Path) -> None:
    """Stop in the n-th forward pass of the whole network once training has begun."""
    import torch

    seen = {"train": 0, "eval": 0}

    def hook(module, inputs):
        from cnn_tuning.models.network import Network

        if not isinstance(module, Network) or (not module.training and not seen["train"]):
            return
        kind = "train" if module.training else "eval"
        seen[kind] += 1
        if (kind, seen[kind]) == (mode, number):
            (folder / "here.new").write_text(str(os.getpid()))
            (folder / "here.new").rename(folder / "here")
            while not (folder / "go").exists():
                time.sleep(0.02)

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def die_at_write(death: str, number: int) -> None:
    """End this process at a point of writing its n-th checkpoint."""
    event, part = DEATHS[death]
    count = 0

    def hook(name, arguments):
        nonlocal count
        path = str(arguments[0]) if arguments else ""
        if name != event or not path.endswith(".partial") or part not in Path(path).name:
            return
        if name == "open" and "w" not in str(arguments[1]):
            return
        count += 1
        if count != number:
            return
        if death == "byte":  # the kernel ends it in the middle of a write: Python cannot catch that
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if f"cnn_tuning.stages.{os.environ.get('STRIKE_STAGE')}" in sys.orig_argv:
    point, at = os.environ["STRIKE_AT"].split()
    if point in DEATHS:
        die_at_write(point, int(at))
    else:
        wait_at_forward(point, int(at), Path(os.environ["STRIKE_FOLDER"]))
