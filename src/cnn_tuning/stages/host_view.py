"""How a run at work looks in the terminal: a record and a look at its host in, a panel or lines out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import click

from cnn_tuning.stages.host_next import Job

if TYPE_CHECKING:
    from rich.text import Text

    from cnn_tuning.cloud.follow import Look
    from cnn_tuning.cloud.runs import Record

    Show = Callable[[Record, Look, datetime], None]


@contextmanager
def shown(job: Job) -> Iterator[Show]:
    """Yield what shows a look: a panel that is drawn again in a terminal, a line for each change elsewhere."""
    from rich.console import Console
    from rich.live import Live

    from cnn_tuning.cloud.aws import hide_account

    console = Console(highlight=False, markup=False)
    said = ""

    def print_change(record: Record, look: Look, now: datetime) -> None:
        nonlocal said
        line = look.problem or (look.lines[-1] if look.lines else "")
        told = hide_account(f"{look.stage}: {line}" if line else look.stage)
        if told != said:
            said = told
            click.echo(f"{_clock(record.hours(now))} ${record.usd(now):.3f} {told}")

    if not console.is_terminal:
        yield print_change
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        yield lambda record, look, now: live.update(_panel(job, record, look, now))


def _panel(job: Job, record: Record, look: Look, now: datetime) -> Text:
    from rich.text import Text

    from cnn_tuning.cloud.aws import hide_account

    last = record.hosts[-1]
    left = max(0.0, (datetime.fromisoformat(last.ends) - now).total_seconds() / 3600)
    lines = look.lines[-3:] or [""]
    if look.problem:
        lines = [f"not seen now, trying again: {look.problem}"]
    head = (
        f"run {record.run} · {last.id} {last.type} {last.market} · {look.stage}\n"
        f"{_clock(record.hours(now))} · ${record.usd(now):.3f} of ${job.host.budget:.2f} · "
        f"ends by itself in {_clock(left)} · Ctrl-C leaves it alone\n"
    )
    return Text(head + hide_account("\n".join(lines)), no_wrap=True, overflow="ellipsis")


def _clock(hours: float) -> str:
    return str(timedelta(seconds=round(hours * 3600)))
