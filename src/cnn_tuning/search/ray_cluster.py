"""Connecting to Ray, or starting one on this machine; always with token authentication.

A Ray of this machine listens on its network addresses, too: whoever has no token is turned away. The token is in
a file that only this user reads, or wherever RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH say; it is never printed.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cnn_tuning.config import RayConfig
from cnn_tuning.errors import UserError

# Next to nothing is passed through it. Ray's least is 75 MiB.
OBJECT_STORE_BYTES = 100 * 2**20
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray gives up when parts of it are not there after 15 s, which a busy machine may take to import them.
TRIES = 3


def check_ray(ray: RayConfig) -> None:
    """Raise a UserError where Ray is not installed, or cannot be asked for such a share."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("search.executor=ray: Ray is not installed: pip install 'cnn-tuning[ray]'")
    if ray.num_gpus > 1 and ray.num_gpus != int(ray.num_gpus):
        raise UserError(f"search.ray.num_gpus: got {ray.num_gpus:g}, above 1 it must be a whole number")


def connect(config: RayConfig) -> Any:
    """Return the module `ray`, connected; `disconnect` undoes it.

    Raises:
        UserError: Ray does not start, does not answer, or refuses the token.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not _has_token():
        if config.address is not None:
            raise UserError(
                f"search.ray.address={config.address}: no token for it: set RAY_AUTH_TOKEN_PATH to a copy of the "
                "file that it was started with (`ray get-auth-token --generate` makes one)"
            )
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_own_token())
    import ray

    with _own_signals():
        for left in reversed(range(1 if config.address else TRIES)):
            said: list[str] = []
            try:
                with _kept(said) if config.address else nullcontext():
                    _init(ray, config)
                break
            except SystemExit:  # Ray's own answer to SIGTERM
                ray.shutdown()
                raise SystemExit(128 + signal.SIGTERM) from None
            except Exception as error:  # of many kinds, a bare Exception among them
                ray.shutdown()
                if not left:
                    raise _unreachable(config, error, said) from None
    return ray


def _init(ray: Any, config: RayConfig) -> None:
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(
        address=config.address or "local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if config.address else local),
    )


def disconnect() -> None:
    """Leave Ray; one that was started here ends with all its processes."""
    import ray

    with _own_signals():
        ray.shutdown()


def room(ray: Any, config: RayConfig) -> tuple[str, bool]:
    """Return in words what there is, and whether any host could ever hold a worker."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    fits = any(n.get("CPU", 0) >= config.num_cpus and n.get("GPU", 0) >= config.num_gpus for n in nodes)
    hosts = "1 host" if len(nodes) == 1 else f"{len(nodes)} hosts"
    return f"{hosts}, {cpus:g} CPUs, {gpus:g} GPUs", fits


def share(config: RayConfig) -> str:
    """Return in words what one worker takes."""
    return f"{config.num_cpus:g} CPUs and {config.num_gpus:g} GPUs"


def _has_token() -> bool:
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    token = os.environ["RAY_AUTH_MODE"].lower() == "token"
    return given or not token or (Path.home() / ".ray" / "auth_token").is_file()


@functools.cache  # Ray, too, reads it once in a process
def _own_token() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cnn-tuning-ray-"))  # for this user only
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray sets its own answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _kept(said: list[str]) -> Iterator[None]:
    """Add to `said` what is written to standard error, and write it there in the end unless the block fails.

    Ray's library, which is not Python, warns there once a second while it is refused; its exception then says
    only that it could not connect.
    """
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    sys.stderr.write(said[-1])


def _unreachable(config: RayConfig, error: Exception, said: list[str]) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    if config.address is None:
        return UserError(
            f"Ray did not start here ({reason}): try again when the machine is less busy, or start it by hand "
            "(`ray start --head`) and set search.ray.address=auto"
        )
    if any(word in text for text in (reason, *said) for word in ("Unauthenticated", "InvalidAuthToken")):
        return UserError(
            f"Ray at {config.address} refuses the token, so RAY_AUTH_TOKEN_PATH must name a copy of its own"
        )
    return UserError(f"Ray at {config.address} does not answer ({reason}): start it, or mend search.ray.address")
