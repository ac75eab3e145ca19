"""What things are called and tagged, so that everything of a run is found again by its name or its tags."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cnn_tuning.errors import UserError

PATH = "/cnn-tuning/"
# What the name of the role that the schedule takes ends in.
GUARD = ".guard"
_RUN = re.compile(r"[a-z0-9][a-z0-9-]{2,31}")


@dataclass(frozen=True)
class Order:
    """One host that is asked for. `attempt` counts replacements of a host that spot took away."""

    run: str
    owner: str
    commit: str
    budget: float
    ends: datetime
    attempt: int = 0

    def __post_init__(self) -> None:
        check_run(self.run)


def check_run(run: str) -> str:
    """Return a run's name that fits all that is named after it."""
    if not _RUN.fullmatch(run):
        raise UserError(f"run {run!r}: 3 to 32 small letters, digits and hyphens")
    return run


def name_of(project: str, run: str) -> str:
    """Return the name of a run's template, group, roles and schedule: 57 characters at most, IAM takes 64.

    Neither part can hold an underscore: no project's names begin with another's.
    """
    return f"{project}_{run}"


def token(order: Order, purpose: str) -> str:
    """Return a client token: the same for each retry of the same step of the same host."""
    return hashlib.sha256(f"{order.run}/{order.attempt}/{purpose}".encode()).hexdigest()[:32]


def tags_of(project: str, order: Order) -> dict[str, str]:
    """Return the tags of everything that belongs to a host."""
    return {
        "Name": name_of(project, order.run),
        "project": project,
        "run": order.run,
        "owner": order.owner,
        "commit": order.commit,
        "expires-at": order.ends.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "budget": f"{order.budget:.2f}",
        "attempt": str(order.attempt),
    }


def as_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return tags as AWS takes them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def as_mapping(tags: list[dict[str, str]] | None) -> dict[str, str]:
    """Return tags as a mapping."""
    return {tag["Key"]: tag["Value"] for tag in tags or []}


def lifetime(max_hours: float, budget: float, price_per_hour: float) -> timedelta:
    """Return how long a host may live: `max_hours`, or less where the budget ends first; whole minutes."""
    minutes = int(min(max_hours, budget / price_per_hour) * 60)
    if minutes < 1:
        raise UserError(f"budget ${budget:.2f} does not pay for a minute at ${price_per_hour:.2f} per hour")
    return timedelta(minutes=minutes)


def parse_time(text: str | None) -> datetime | None:
    """Return a time that was written down, such as an `expires-at` tag; None if it is not one."""
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found and found.tzinfo is None else found
