"""Which running trials nobody works on: trials come in at each look, those that give no sign of life go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# No more of the time between two looks counts as silence: this process may itself have been stopped.
LONGEST_LOOK_S = 5.0


@dataclass
class _Heard:
    """The last sign of life of one process on one trial, and the seconds since, as counted here."""

    beat: float
    at: float
    silent_s: float = 0.0


class Watch:
    """Counts, by this process's own clock, for how long each running trial gives no sign of life."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._heard: dict[tuple[int, str], _Heard] = {}

    def silent(self, running: Sequence[FrozenTrial], now: float) -> list[FrozenTrial]:
        """Return the trials that were silent for longer than the grace; `now` is a monotonic time."""
        heard: dict[tuple[int, str], _Heard] = {}
        found = []
        for trial in running:
            key = trial.number, trial.user_attrs.get("worker", "")
            beat = trial.user_attrs.get("seconds", 0.0)
            known = self._heard.get(key)
            if known is None or known.beat != beat:
                heard[key] = _Heard(beat, now)
                continue
            known.silent_s += min(now - known.at, LONGEST_LOOK_S)
            known.at = now
            heard[key] = known
            if known.silent_s > self.grace_s:
                found.append(trial)
        self._heard = heard
        return found
