"""Follow a run in the terminal to its end: live progress, replacements, then results, cost and nothing left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

import click

from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_next import Job, allowance, options_of, start_next
from cnn_tuning.stages.host_view import shown

if TYPE_CHECKING:
    from cnn_tuning.cloud.follow import Ended
    from cnn_tuning.cloud.runs import Record

REASONS = {
    "failed": "the host's work failed in {stage}",
    "idle": "the host ended itself: it was idle (host.idle_minutes)",
    "over-budget": "the host's time or budget is up; its work is saved",
    "ended": "the host was ended by hand or by its schedule",
}
TAKEN_AWAY = {
    "interrupted": "was interrupted, its work is saved",
    "vanished": "has gone without a word",
    "over-budget": "has saved its work, as its time is up; the run has some left",
}
TAIL = 8
# For capacity, before a run is left to be gone on with by hand: about ten minutes.
WAIT_S, TRIES = 60.0, 10


def follow(job: Job, record: Record) -> None:
    """Show the run's progress until it ends, replace hosts that are taken away, and bring it to its end.

    Ctrl-C ends this command only.
    """
    try:
        conclude(job, _to_its_end(job, record))
    except KeyboardInterrupt:
        click.echo(f"\ndetached: run {record.run} is left as it is, and its guards end its host in time")
        go_on(job, record)
        raise click.exceptions.Exit(130) from None


def go_on(job: Job, record: Record) -> None:
    """Say what can be done with a run that goes on by itself."""
    if record.mode == "interactive":
        click.echo(f"ready in about {job.host.setup_minutes:g} minutes: cnn-tuning host tunnel {record.run}")
    else:
        click.echo(f"follow it to its results: cnn-tuning host run --run {record.run}")
    click.echo(f"its output: cnn-tuning host logs {record.run} -f")
    click.echo(f"end it: cnn-tuning host down {record.run}")


def is_over(job: Job, record: Record) -> bool:
    """Bring a run to its end whose last host finished while nobody followed; say whether it was so."""
    from cnn_tuning.cloud.follow import Ended, judge, look_at

    if not record.hosts:
        return False
    look = look_at(job.aws, job.place, record.hosts[-1])
    if judge(look) != "finished":
        return False
    conclude(job, Ended(record, "finished", look))
    return True


def _to_its_end(job: Job, record: Record) -> Ended:
    from cnn_tuning.cloud.follow import watch

    replaced = 0
    while True:
        try:
            with shown(job) as show:
                ended = watch(job.aws, job.host, job.place, record, show)
        except UserError as error:
            raise UserError(f"{error}; go on: `cnn-tuning host run --run {record.run}`") from None
        ended = _closed(job, ended)
        record, last = ended.record, ended.record.hosts[-1]
        if ended.verdict not in TAKEN_AWAY or (ended.verdict == "over-budget" and not _may_go_on(job, ended)):
            return ended
        how = TAKEN_AWAY[ended.verdict]
        click.echo(f"host {last.id} {how}: it ran {last.hours(_now()):.2f} h for ${last.usd(_now()):.3f}")
        if replaced >= job.host.max_replacements:
            return replace(ended, problem=f"{replaced} hosts were replaced already (host.max_replacements)")
        replaced += 1
        click.echo(f"replacing it ({replaced} of at most {job.host.max_replacements})")
        try:
            job = _with_options(job, record)
            record = _replaced(job, record)
        except UserError as error:
            return replace(ended, problem=str(error))


def _with_options(job: Job, record: Record) -> Job:
    """Return the job with the types that may be taken now, where none were asked for yet."""
    from cnn_tuning.config import compose

    return (
        job
        if job.options
        else replace(job, options=options_of(compose(record.overrides), job.aws, record.measured))
    )


def _may_go_on(job: Job, ended: Ended) -> bool:
    """Tell whether a host's time was up before the run's: it is reckoned at the dearest price."""
    if ended.asked:
        return False
    try:
        allowance(_with_options(job, ended.record), ended.record, _now())
    except UserError:
        return False
    return True


def _replaced(job: Job, record: Record) -> Record:
    """Start the next host, waiting a while for one to be had."""
    from cnn_tuning.cloud.aws import NoCapacity
    from cnn_tuning.cloud.runs import known_record

    for left in reversed(range(TRIES)):
        try:
            return start_next(job, record)
        except NoCapacity as error:
            if not left:
                raise
            click.echo(f"{error}: trying again, {left} times at most")
            wait()
            record = known_record(job.place)
    raise AssertionError


def wait() -> None:
    """Wait until there may be capacity again."""
    time.sleep(WAIT_S)


def _closed(job: Job, ended: Ended) -> Ended:
    """End a host that did not end itself, and write down what it cost."""
    from cnn_tuning.cloud import ledger
    from cnn_tuning.cloud.runs import write_record
    from cnn_tuning.cloud.teardown import end_hosts

    record = ended.record
    if not record.hosts[-1].ended:
        end_hosts(job.aws, job.host.project, record.run)
        record = record.with_last(ended=_now().isoformat(timespec="seconds"))
    ledger.write(ledger.bills_of(record))
    return replace(ended, record=write_record(job.place, record))


def conclude(job: Job, ended: Ended) -> None:
    """Remove what is left of the run's host, bring its results here, and say what it cost.

    Raises:
        UserError: it did not finish, or its results could not be taken; with what to do about it.
    """
    from cnn_tuning.cloud.teardown import end_hosts
    from cnn_tuning.stages.host_results import bring_back

    ended = _closed(job, ended)
    record, problems = ended.record, []
    if ended.verdict != "finished":
        problems.append(_why(ended))
        _print_tail(job, ended)
    steps: tuple[Callable[[], object], ...] = (
        lambda: end_hosts(job.aws, job.host.project, record.run, wait=False),  # it goes while results come
        lambda: bring_back(job.place, record, wanted="all" if ended.verdict == "finished" else "runs"),
        lambda: _remove(job, record.run),
    )
    for step in steps:
        try:
            step()
        except UserError as error:
            problems.append(str(error))
    hosts = "1 host" if len(record.hosts) == 1 else f"{len(record.hosts)} hosts"
    hours, usd = record.hours(_now()), record.usd(_now())
    click.echo(f"cost: ${usd:.3f} of ${job.host.budget:.2f}, {hours:.2f} h on {hosts}")
    if problems:
        raise UserError("\n".join(problems))


def _remove(job: Job, run: str) -> None:
    from cnn_tuning.cloud.teardown import remove

    remove(job.aws, job.host.project, run)
    click.echo(f"run {run}: nothing of it is left on EC2")


def _why(ended: Ended) -> str:
    run = ended.record.run
    if ended.problem:
        reason = f"its host {TAKEN_AWAY[ended.verdict]}, and there is no other one: {ended.problem}"
    else:
        reason = REASONS[ended.verdict].format(stage=ended.look.state.get("stage") or "its start")
    if not ended.saved:
        reason = "the budget is up, and the host did not save its work in time: the last checkpoint counts"
    more = " --budget … --max-hours …" if ended.verdict == "over-budget" else ""
    return (
        f"run {run}: {reason}; go on: `cnn-tuning host run --run {run}{more}`; log: `cnn-tuning host logs {run}`"
    )


def _print_tail(job: Job, ended: Ended) -> None:
    from cnn_tuning.cloud.aws import hide_account

    lines = ended.look.lines
    if ended.verdict == "failed" and not lines:
        lines = (job.place.read("boot.log") or b"").decode(errors="replace").splitlines()
    for line in lines[-TAIL:] if ended.verdict == "failed" else ():
        click.echo(f"  {hide_account(line)}")


def _now() -> datetime:
    from cnn_tuning.cloud import inventory

    return inventory.utc_now()
