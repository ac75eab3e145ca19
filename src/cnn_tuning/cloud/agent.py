"""The host's side of a run: `python -m cnn_tuning.cloud.agent restore | pull | run -- COMMAND | results`.

`boot.sh` calls it in the project's folder. `restore` brings an earlier attempt's work back, `pull` the data,
`run` supervises the pipeline and keeps the bucket up to date, `results` uploads what the laptop reads. Exit status
75: the work is not done but saved, and another host can go on with it; 1, with one line on stderr: why not.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from cnn_tuning.cloud import checkpoint, pulling
from cnn_tuning.cloud.attempt import Attempt
from cnn_tuning.cloud.runfolder import RunFolder
from cnn_tuning.cloud.supervise import Times, supervise
from cnn_tuning.config import PRICE
from cnn_tuning.errors import UserError


@click.group()
@click.option("--at", required=True, help="The run's folder: s3://BUCKET/PREFIX/runs/RUN.")
@click.option("--region", required=True)
@click.option("--attempt", type=int, default=0)
@click.option(
    "--told", type=click.Path(path_type=Path), default=Path("state.json"), help="Written with the state."
)
@click.option("--began", type=float, default=None, help="When this host began, in seconds since the epoch.")
@click.option("--price", type=float, default=None, help="Dollars per hour, at the most.")
@click.pass_context
def agent(
    context: click.Context,
    at: str,
    region: str,
    attempt: int,
    told: Path,
    began: float | None,
    price: float | None,
) -> None:
    """Do the host's side of a run, in the project's folder."""
    patient = context.invoked_subcommand != "restore"
    folder = RunFolder.at(at, region, patient=patient)
    context.obj = Attempt(folder, region, attempt, told, began or time.time(), price)


@agent.command()
@click.pass_obj
def restore(attempt: Attempt) -> None:
    """Bring back what an earlier attempt left, if there was one; say within 15 s why the bucket cannot be read."""
    for line in checkpoint.restore(attempt.folder, attempt.project):
        click.echo(line)


@agent.command()
@click.pass_obj
def pull(attempt: Attempt) -> None:
    """Pull what the stages start from, and check it."""
    pulling.pull(attempt.project, attempt.region)


@agent.command()
@click.argument("command", nargs=-1, required=True)
@click.option("--ends-at", type=float, default=None, help="When the host ends itself, in seconds since the epoch.")
@click.option("--margin", default=Times.margin, help="Stop so many seconds before that.")
@click.option("--look-every", default=Times.look_every, help="Seconds between looks for the spot notice.")
@click.option("--save-every", default=Times.save_every)
@click.option("--progress-every", default=Times.progress_every)
@click.option("--grace", default=Times.grace, help="Seconds that COMMAND has for its own saving.")
@click.pass_obj
def run(attempt: Attempt, command: tuple[str, ...], **times: float) -> None:
    """Run COMMAND, and save its work when the host is taken away or its lifetime ends."""
    attempt.learn_price()
    attempt.keep_files()
    ended = supervise(
        command,
        Times(**times),
        attempt.output,
        report=attempt.report,
        saves=(attempt.archive, attempt.push),
        metadata=attempt.metadata,
        # 0: not known here, and filled in by who fetches the runs; never that of the machine that sent the code.
        environment={PRICE: f"{attempt.price_per_hour or 0:g}"},
    )
    code = attempt.conclude(ended)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # an upload that hangs would keep the host


@agent.command()
@click.pass_obj
def results(attempt: Attempt) -> None:
    """Upload what the laptop reads when the work is done."""
    attempt.results()


if __name__ == "__main__":
    try:
        agent(auto_envvar_prefix="AGENT")
    except UserError as error:
        sys.exit(f"error: {error}")
