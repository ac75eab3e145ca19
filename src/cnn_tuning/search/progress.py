"""What a person sees of a search: a bar with the best value and the time left; in a log a line a trial."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cnn_tuning.config import SearchConfig, label_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


class SearchProgress:
    """Tells each trial once, when it has ended. What ended before this process began is counted, not told."""

    def __init__(self, search: SearchConfig, trials: Sequence[FrozenTrial]) -> None:
        self.search = search
        self.told = {trial.number for trial in trials if trial.state.is_finished()}
        self.known, self.began = len(self.told), time.monotonic()
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]search"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[best]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
                auto_refresh=False,
            )
            self.bar.add_task(
                "search", total=len(trials), completed=self.known, best=_best(search, trials), left=""
            )
            self.bar.start()

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """Tell what is new."""
        done = sum(trial.state.is_finished() for trial in trials)
        best, left = _best(self.search, trials), self._left(len(trials), done)
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self.told:
                self.told.add(trial.number)
                self.say(f"{len(self.told)}/{len(trials)}: {_line(self.search, trial)}; {best}{left}")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, best=best, left=left)
            self.bar.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(f"search {text}", highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()

    def _left(self, total: int, done: int) -> str:
        new = done - self.known
        if not new or done == total:
            return ""
        seconds = (time.monotonic() - self.began) / new * (total - done)
        return f"; about {seconds:.0f} s left" if seconds < 100 else f"; about {seconds / 60:.0f} min left"


def _line(search: SearchConfig, trial: FrozenTrial) -> str:
    values = ", ".join(f"{name.rpartition('.')[2]} {label_of(value)}" for name, value in trial.params.items())
    found = f" with {_values(search, trial)}" if trial.state.name == "COMPLETE" else ""
    reason = f" ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else ""
    return f"trial {trial.number} {STATES[trial.state.name]}{found}{reason} [{values}]"


def _values(search: SearchConfig, trial: FrozenTrial) -> str:
    return ", ".join(f"{o.metric} {v:.6g}" for o, v in zip(search.objectives, trial.values, strict=True))


def _best(search: SearchConfig, trials: Sequence[FrozenTrial]) -> str:
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not complete:
        return "none complete yet"
    if len(search.objectives) > 1:
        return f"{len(complete)} complete"
    chosen = max if search.objectives[0].direction == "maximize" else min
    best = chosen(complete, key=lambda trial: trial.values[0])
    return f"best {best.values[0]:.6g} (trial {best.number})"
