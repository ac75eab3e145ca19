"""What the commands around hosts share: the section that they read, and their tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnn_tuning.config import HostConfig

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Needed:
    """The section that all of them but `plan` read."""

    host: HostConfig


def new_table(*titles: str) -> Table:
    """Return a table with these columns."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """Print a table; its lines wrap in a narrow terminal, but nothing is cut off."""
    from rich.console import Console

    Console(highlight=False, soft_wrap=True, markup=False, width=300).print(table)


def figure(value: float | None, form: str) -> str:
    """Return a number as a person reads it, `?` where it is unknown."""
    return "?" if value is None else format(value, form)
