"""`cnn-tuning host pull` and the end of `host run`: MLflow runs, dvc.lock, models and metrics come here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import PARAMS, TrackingConfig, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import Needed

if TYPE_CHECKING:
    from cnn_tuning.cloud.runs import Place, Record

WANTED = ("models/", "results/")


@dataclass(frozen=True)
class _Tracking:
    tracking: TrackingConfig


def pull(run: str, overrides: Sequence[str]) -> None:
    """Bring here what a run's hosts have left so far."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.follow import settle
    from cnn_tuning.cloud.inventory import utc_now
    from cnn_tuning.cloud.runs import known_record, place_of

    host = compose_sections(Needed, overrides).host
    aws = Aws(host.region)
    aws.check()
    place = place_of(aws, host, run)
    bring_back(place, settle(aws, place, known_record(place), utc_now()))


def bring_back(place: Place, record: Record, *, finished: bool = True) -> None:
    """Bring logs and MLflow runs here; of one that `finished`, dvc.lock, models and results, too.

    Raises:
        UserError: a part could not be had, or stays as it is because it was changed here; the rest is done.
    """
    from cnn_tuning.cloud import results, supply

    over = not record.hosts or record.hosts[-1].ended is not None
    folder = results.fetch(place, record, over=over)
    problems = _replay(folder / results.SPOOL)
    if finished and record.mode == "pipeline":
        try:
            click.echo(results.take(folder, record, PARAMS.read_text()))
            paths = [out.path for out in supply.outs() if out.path.startswith(WANTED)]
            click.echo(
                f"models and metrics: {supply.pull(paths)} files fetched, {', '.join(paths) or 'none named'}"
            )
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _replay(spool: Path) -> list[str]:
    """Deliver a host's MLflow runs to the store of this project; return what went wrong."""
    from cnn_tuning.errors import redact
    from cnn_tuning.tracking.deliver import sync
    from cnn_tuning.tracking.store import tracking_uri

    if not spool.is_dir():
        click.echo("MLflow: the host has left no runs yet")
        return []
    uri = tracking_uri(compose_sections(_Tracking).tracking)
    rows = sync(spool, uri)
    states = [row.state for row in rows]
    running = f", {states.count('running')} not ended yet" if "running" in states else ""
    click.echo(f"MLflow: {states.count('delivered')} runs are in {redact(uri)}{running}")
    again = f"again: `cnn-tuning sync {spool} --to {redact(uri)}`"
    return [f"MLflow run {row.name}: {row.message}; {again}" for row in rows if row.state == "failed"]
