"""`cnn-tuning serve`: a model's name and overrides in, an HTTP server out that tells its first answer's time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cnn_tuning.config import ServingConfig, TrackingConfig
from cnn_tuning.serving import first_answer
from cnn_tuning.serving.server import Served, is_uri
from cnn_tuning.serving.server import serve as answer
from cnn_tuning.serving.settings import Local, Registered, champion, settings
from cnn_tuning.tracking.store import tracking_uri


def serve(model: str | None, overrides: Sequence[str]) -> None:
    """Answer over HTTP until stopped; see `cnn_tuning.serving.server.serve`."""
    began = first_answer.command_began()
    tracking: TrackingConfig | None = None

    def measure(served: Served, config: ServingConfig) -> None:
        first = first_answer.ask_front(config)
        if first is None:
            return
        if first.status != 200:
            print(f"the first request was refused ({first.status}): {first.text}", file=sys.stderr, flush=True)
            return
        by = f"{served.name} version {served.version}"
        tags = {"model": by, "serving.where": "local"}
        first_answer.tell(f"serve {by}", first.at - began, config, tracking, tags)

    if model and not is_uri(model):
        answer(model, settings(Local, overrides).serving, beside=measure)
        return
    own = settings(Registered, overrides)
    tracking = own.tracking
    answer(model or champion(own.serving, own.registry), own.serving, tracking_uri(tracking), beside=measure)
