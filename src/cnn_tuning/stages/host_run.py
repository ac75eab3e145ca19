"""`cnn-tuning host run` and `host up`: what is asked and told before a host starts; then it is followed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import PARAMS, compose, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_next import Job, allowance, options_of, start_next
from cnn_tuning.stages.host_tables import Needed
from cnn_tuning.stages.remote import bucket_of

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.runs import Mode, Record


@dataclass(frozen=True)
class Wish:
    """What a person gave: overrides of `host`, another experiment, a run to go on with, speeds of types."""

    overrides: tuple[str, ...]
    experiment: str | None = None
    name: str | None = None
    mode: Mode = "pipeline"
    yes: bool = False
    measured: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Return all of it as overrides."""
        return (*self.overrides, *([f"experiment={self.experiment}"] if self.experiment else []))


def run(wish: Wish, *, detach: bool = False) -> None:
    """Start a host on the code as it stands, or go on with a run, and follow it unless told not to."""
    from cnn_tuning.cloud.aws import Aws, telling
    from cnn_tuning.cloud.runs import place_of, read_record, write_record
    from cnn_tuning.stages.host_follow import follow, go_on, is_over

    for text in wish.overrides:
        _check_override(text)
    host = compose_sections(Needed, wish.given).host
    aws = Aws(host.region)
    aws.check()
    bucket = bucket_of(None, host)
    with telling(f"bucket {bucket}"):
        # Not HeadBucket: that takes the right to list all of the bucket.
        aws.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{host.prefix}/", MaxKeys=1)
    record = read_record(place_of(aws, host, wish.name)) if wish.name else None
    if record is None:
        job, record = _begin(aws, wish)
        record = start_next(job, record)
    else:
        job, record = _reopen(aws, record, wish)
        if is_over(job, record):
            return
        if record.hosts and not record.hosts[-1].ended:
            click.echo(f"run {record.run}: host {record.hosts[-1].id} runs")
            write_record(job.place, record)
        else:
            options = options_of(compose(record.overrides), aws, record.measured, record.mode)
            job = replace(job, options=options)
            _confirm(job, record, yes=wish.yes)
            record = start_next(job, record)
    if detach or record.mode == "interactive":
        go_on(job, record)
    else:
        follow(job, record)


def _begin(aws: Aws, wish: Wish) -> tuple[Job, Record]:
    """Plan, ask, and bring data and code to where the host finds them."""
    from cnn_tuning.cloud import code, results, supply
    from cnn_tuning.cloud.runs import Record, place_of, write_record

    config, where = compose(wish.given), Path()
    remote = supply.remote_url(where)
    supply.check_reachable(remote, bucket_of(None, config.host), config.host.prefix)
    options = options_of(config, aws, wish.measured, wish.mode)
    sent = _with_experiment(PARAMS.read_text(), wish.experiment) if wish.experiment else None
    taken = code.snapshot(where, {PARAMS.name: sent} if sent else None)
    record = Record(
        run=wish.name or _new_name(config.experiment),
        commit=taken.commit,
        experiment=config.experiment,
        overrides=wish.given,
        lock=results.digest(supply.DVC_LOCK),
        params=results.digest_of_params(sent or PARAMS.read_text()),
        mode=wish.mode,
        measured=wish.measured,
    )
    job = Job(aws, config.host, place_of(aws, config.host, record.run), options)
    changes = ", with uncommitted changes" if taken.changed else ""
    click.echo(f"code: {taken.commit[:12]}{changes}; experiment {config.experiment}")
    _confirm(job, record, yes=wish.yes)
    _push(remote, config.host.region)
    code.upload(aws.client("s3"), where, taken.commit, record.run, job.place.bucket, job.place.prefix)
    return job, write_record(job.place, record)


def _reopen(aws: Aws, record: Record, wish: Wish) -> tuple[Job, Record]:
    """Return a known run as it is now, with what it was given at first and what it is given now."""
    from cnn_tuning.cloud.follow import settle
    from cnn_tuning.cloud.inventory import utc_now
    from cnn_tuning.cloud.runs import place_of

    if wish.experiment and wish.experiment != record.experiment:
        raise UserError(f"run {record.run} is of experiment {record.experiment}: leave --experiment out, or --run")
    merged, measured = _latest(record.overrides, wish.given), _latest(record.measured, wish.measured)
    host = compose_sections(Needed, merged).host
    place = place_of(aws, host, record.run)
    known = replace(record, overrides=merged, measured=measured)
    return Job(aws, host, place), settle(aws, place, known, utc_now())


def _latest(before: Sequence[str], now: Sequence[str]) -> tuple[str, ...]:
    """Return what was given as KEY=VALUE, each key as it was given last."""
    return tuple({text.partition("=")[0]: text for text in (*before, *now)}.values())


def _confirm(job: Job, record: Record, *, yes: bool) -> None:
    from cnn_tuning.cloud.inventory import utc_now

    hours, usd = allowance(job, record, utc_now())
    click.echo(f"the host ends after {hours:.2f} h at the latest, at ${usd:.2f} at the most")
    if not yes:
        click.confirm("start it?", abort=True)


def _push(remote: str, region: str) -> None:
    """Push the data that the host is to pull, and say what and how much it is."""
    from cnn_tuning.cloud import supply

    outs = supply.outs()
    if not outs:
        click.echo("data: nothing to push: dvc.lock names no outputs, so the host fetches the data itself")
        return
    most = sorted(outs, key=lambda out: -out.size)[:3]
    named = ", ".join(f"{out.path} {out.size / 1e6:.1f} MB" for out in most)
    total = sum(out.size for out in outs) / 1e6
    click.echo(f"data: {len(outs)} outputs, {total:.1f} MB, to {remote} ({named}): pushing what is missing there")
    click.echo(f"data: {supply.push(region)} files pushed")


def _with_experiment(text: str, experiment: str) -> str:
    """Return params.yaml's text with another experiment; everything else that it says stays."""
    line = f"experiment: {experiment}"
    changed, count = re.subn(r"(?m)^experiment\s*:.*$", line, text)
    return changed if count else f"{line}\n{text}"


def _check_override(text: str) -> None:
    if not text.startswith(("host=", "host.")):
        raise UserError(
            f"{text}: a host runs what params.yaml says: put it there; here only `host` can be changed, and "
            "--experiment"
        )


def _new_name(experiment: str) -> str:
    import secrets

    from cnn_tuning.cloud.inventory import utc_now

    about = "".join(c if c.isalnum() else "-" for c in experiment.lower() if c.isascii())[:12].strip("-")
    return f"{utc_now():%m%d-%H%M%S}-{about or 'run'}-{secrets.token_hex(2)}"
