"""`cnn-tuning host pull` and the end of `host run`: MLflow runs, dvc.lock, models and metrics come here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cnn_tuning.config import PARAMS, TrackingConfig, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import Needed

if TYPE_CHECKING:
    from cnn_tuning.cloud.runs import Place, Record

WANTED = ("models/", "results/")
# Of what a run's hosts leave: MLflow runs only; the pipeline's results, too, as far as they go; or all of them.
Wanted = Literal["runs", "what there is", "all"]


@dataclass(frozen=True)
class _Tracking:
    tracking: TrackingConfig


def pull(run: str, overrides: Sequence[str]) -> None:
    """Bring here what a run's hosts have left so far; it may be nothing yet."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.follow import settle
    from cnn_tuning.cloud.inventory import utc_now
    from cnn_tuning.cloud.runs import known_record, place_of

    host = compose_sections(Needed, overrides).host
    aws = Aws(host.region)
    aws.check()
    place = place_of(aws, host, run)
    bring_back(place, settle(aws, place, known_record(place), utc_now()), wanted="what there is")


def bring_back(place: Place, record: Record, *, wanted: Wanted) -> None:
    """Bring logs and MLflow runs here; where more is `wanted`, dvc.lock, models and results, too.

    Raises:
        UserError: a part could not be had, or stays as it is because it was changed here; the rest is done.
    """
    from cnn_tuning.cloud import results

    over = not record.hosts or record.hosts[-1].ended is not None
    folder = results.fetch(place, record, over=over)
    problems = _replay(folder / results.SPOOL)
    if wanted != "runs" and record.mode == "pipeline":
        try:
            _take(folder, record, wanted)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _take(folder: Path, record: Record, wanted: Wanted) -> None:
    """Put dvc.lock in its place and pull what it names; elsewhere if params.yaml here asks for something else."""
    from cnn_tuning.cloud import results, supply

    theirs = folder / "dvc.lock"
    if not theirs.is_file():
        none_yet = f"run {record.run} has left no dvc.lock yet: see `cnn-tuning host logs {record.run}`"
        if wanted == "all":
            raise UserError(none_yet)
        click.echo(none_yet)
        return
    apart = results.digest_of_params(PARAMS.read_text()) != record.params
    if not apart:
        click.echo(results.take(folder, record))
    paths = [out.path for out in supply.outs(theirs) if out.path.startswith(WANTED)]
    count = supply.pull_apart(paths, theirs, folder / results.APART) if apart else supply.pull(paths)
    where = f", in {folder / results.APART}" if apart else ""
    click.echo(f"models and metrics: {count} files fetched, {', '.join(paths) or 'none named'}{where}")
    if apart:
        click.echo(
            f"dvc.lock stays as it is: the results are of experiment {record.experiment}, params.yaml here asks "
            f"for something else; to take it, too, put `experiment: {record.experiment}` there, then "
            f"`cnn-tuning host pull {record.run}`"
        )


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
