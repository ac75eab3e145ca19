"""What earlier runs measured: a configuration comes in, images per second of trainings on host types go out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cnn_tuning.config import Config, flatten, to_plain
from cnn_tuning.errors import UserError

if TYPE_CHECKING:
    from cnn_tuning.cloud.plan import Measured
    from cnn_tuning.tracking.reading import Recorded

HOST = "cnn_tuning.host"  # its type and market, as `cloud.results` tags what comes back
SPEED = "time/samples_per_second"


def measured_on_hosts(config: Config) -> tuple[list[Measured], list[str]]:
    """Return recorded trainings of this network and size of images on hosts, oldest first, and what to note."""
    from cnn_tuning.cloud.plan import Measured
    from cnn_tuning.tracking.reading import read_runs
    from cnn_tuning.tracking.replay import param_text

    try:
        runs = read_runs(config.tracking)
    except UserError as error:
        return [], [f"speeds of earlier runs on hosts are not known: {error}"]
    about = {"model": to_plain(config.model), "data": {"image": to_plain(config.data.image)}}
    wanted = {name: param_text(value) for name, value in flatten(about).items()}
    return [
        Measured(run.metrics[SPEED], instance_type=run.tags[HOST].split()[0])
        for run in runs
        if run.kind == "train" and run.status == "FINISHED" and run.tags.get(HOST) and _is_like(run, wanted)
    ], []


def _is_like(run: Recorded, wanted: Mapping[str, str]) -> bool:
    return run.metrics.get(SPEED, 0) > 0 and all(run.params.get(name) == text for name, text in wanted.items())
