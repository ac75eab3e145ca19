"""How long it takes from a command to the first answer: measured by asking, told, and recorded as a run.

The run (kind `serving`) has the section `serving` as parameters and the metric `serving/first_answer_s`.
"""

from __future__ import annotations

import http.client
import io
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cnn_tuning.config import ServingConfig, TrackingConfig, flatten, to_plain
from cnn_tuning.errors import UserError

METRIC = "serving/first_answer_s"
WAIT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What came back first, and when (seconds since the epoch)."""

    status: int
    text: str
    at: float


def command_began() -> float:
    """Return when this process was started, in seconds since the epoch: its imports count."""
    import psutil

    return float(psutil.Process().create_time())


def picture() -> bytes:
    """Return a picture that any model takes: a PNG of 32 × 32 grey pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (32, 32), 128).save(buffer, "PNG")
    return buffer.getvalue()


def ask_front(config: ServingConfig) -> Answer | None:
    """Ask the front as soon as it can be asked; None: it was not there within five minutes."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (asked of, not listened on)
    address = everywhere.get(config.host, config.host)
    known = next((name for name in config.allowed_hosts if name != "*"), "localhost")
    body, deadline = picture(), time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(address, config.port, timeout=WAIT_S)
        try:
            connection.request("POST", "/predict", body, {"Host": known, "Content-Type": "image/png"})
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace").strip()
            return Answer(reply.status, text, time.time())
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    return None


def tell(
    name: str,
    seconds: float,
    config: ServingConfig,
    tracking: TrackingConfig | None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Print the time and, where there is a tracking store, record it; a store that is away stops nothing."""
    print(f"first answer {seconds:.1f} s after the command", flush=True)
    if tracking is None:
        return
    from cnn_tuning.tracking.run import Run

    params = {key: value for key, value in flatten({"serving": to_plain(config)}).items() if value is not None}
    try:
        with Run.start(tracking, name=name, kind="serving", params=params, tags=tags, waits=False) as run:
            run.log_metrics({METRIC: seconds})
    except UserError as error:
        print(f"the time is not recorded: {error}", file=sys.stderr, flush=True)
