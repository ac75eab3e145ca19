"""One study that several processes work on: who has which trial, and what becomes of it.

A study has as many trials as the budget says from the start, all WAITING; a trial's number says which values
it is given. A process that takes one writes its name on it and raises `seconds` while it works on it; what
was interrupted is set back to WAITING with its values and number, so that the study comes out as if nothing
had happened. Changes of a trial's state are made under one lock; whoever lost a trial meanwhile is told so.

User attributes of a trial: `worker` (host:pid:start, of Ray host/tag:pid:start), `seconds` (its sign of life),
`retries`, `reason` (why it failed), and what `trial.Spent` has.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from cnn_tuning.config import Recipe, SearchConfig
from cnn_tuning.search.samplers import build_pruner, build_sampler
from cnn_tuning.search.space import Chosen, first_values, most_epochs, suggest
from cnn_tuning.search.storage import LOCK_WAIT_S, Result, alone, open_storage, patiently

# What becomes of a trial whose process is gone: no more tries are left, one more is, or it does not count as one.
TakenAs = Literal["failed", "lost", "waits"]
BEGAN_S = 2.0  # a process's start is derived from the boot time, which moves when the clock is set


class Lost(Exception):
    """Another process was given the trial: this one seemed dead."""


def this_process(tag: str = "") -> str:
    """Return what tells this process from any other on any machine; a tag says whose it is."""
    import psutil

    process = psutil.Process()
    return f"{platform.node()}{tag and '/'}{tag}:{process.pid}:{process.create_time():.2f}"


def process_of(worker: str) -> Any:
    """Return the living process of this machine that a name means, else None."""
    import psutil

    host, pid, began = worker.rsplit(":", 2)
    if host.partition("/")[0] != platform.node():
        return None
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(began)) < BEGAN_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def is_gone(worker: str) -> bool:
    """Return whether a process of this machine is dead; of another machine's nothing is known."""
    return worker.startswith((f"{platform.node()}:", f"{platform.node()}/")) and process_of(worker) is None


class SharedStudy:
    """A study by name in a storage, as the process `me` sees it, which waits for answers for `patience_s`."""

    def __init__(
        self,
        search: SearchConfig,
        recipe: Recipe,
        name: str,
        folder: Path,
        *,
        me: str,
        patience_s: Callable[[], float],
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search, self.recipe, self.name, self.folder, self.me = search, recipe, name, folder, me
        self.patience_s = patience_s
        self.lock_wait_s = LOCK_WAIT_S
        self.storage = open_storage(search.storage, folder, lambda: self.lock_wait_s)
        self.study = self.patiently(self._open)
        self._id = self.patiently(lambda: self.storage.get_study_id_from_name(name))

    def patiently(self, call: Callable[[], Result]) -> Result:
        """Return what a repeatable call on the storage returns, waiting for a storage that does not answer."""
        return patiently(call, self.search.storage, self.patience_s)

    def _open(self) -> optuna.Study:
        with self._alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # metric names are experimental; it is pinned
            study = optuna.create_study(
                storage=self.storage,
                study_name=self.name,
                directions=[objective.direction for objective in self.search.objectives],
                sampler=build_sampler(self.search, self.recipe.seed),
                pruner=build_pruner(self.search, most_epochs(self.search, self.recipe)),
                load_if_exists=True,
            )
            if study.metric_names is None:
                study.set_metric_names([objective.metric for objective in self.search.objectives])
        return study

    def provide_trials(self) -> int:
        """Add the trials that the budget allows and the study lacks; return how many grid points are left out."""
        points, left_out = first_values(self.search, self.recipe)

        def provide() -> None:
            with self._alone():
                for values in points[len(self.trials()) :]:
                    self.study.enqueue_trial(values)

        self.patiently(provide)
        return left_out

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials of the budget in these states (all by default), by number; not to be changed.

        The study has more where a larger budget was asked for before.
        """
        trials = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if trial.number < self.search.budget.trials]

    def take(self) -> tuple[optuna.Trial, Chosen] | None:
        """Return the next waiting trial with its values, or None where none is left."""
        return self.patiently(self._take)

    def _take(self) -> tuple[optuna.Trial, Chosen] | None:
        with self._alone():
            for running in self.trials(TrialState.RUNNING):
                if running.user_attrs.get("worker") == self.me:  # the answer to an earlier try was lost
                    self._set_waiting(running.number)
            waiting = self.trials(TrialState.WAITING)
            if not waiting:
                return None
            # Named before it runs: no trial runs without a name on it. `ask` takes the first that waits.
            self.storage.set_trial_user_attr(self._trial_id(waiting[0].number), "worker", self.me)
            trial = self.study.ask()
            # Under the lock, too: the next process sees these values.
            return trial, suggest(trial, self.search)

    def is_mine(self, number: int) -> bool:
        """Return whether this process still has a trial."""
        trial = self.storage.get_trial(self._trial_id(number))
        return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == self.me

    def seconds(self, number: int) -> float:
        """Return the seconds that were spent on a trial so far."""
        return float(self.storage.get_trial(self._trial_id(number)).user_attrs.get("seconds", 0.0))

    def beat(self, number: int, seconds: float) -> None:
        """Give a sign of life: how many seconds were spent on a trial, tries before included."""
        if self.is_mine(number):
            self.storage.set_trial_user_attr(self._trial_id(number), "seconds", round(seconds, 3))

    def report(self, trial: optuna.Trial, value: float, step: int) -> bool:
        """Note a trial's value at a step and return whether to give it up.

        Raises:
            Lost: the trial is another process's now.
        """

        def report() -> bool:
            if not self.is_mine(trial.number):
                raise Lost
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a try before may have told it already
                trial.report(value, step)
            return trial.should_prune()

        return self.patiently(report)

    def tell(
        self,
        number: int,
        state: Literal["COMPLETE", "PRUNED", "FAIL"],
        values: Sequence[float] | None,
        attrs: Mapping[str, Any],
    ) -> None:
        """End a trial.

        Raises:
            Lost: the trial is another process's now.
        """

        def tell() -> None:
            with self._alone():
                trial = self.storage.get_trial(self._trial_id(number))
                if trial.user_attrs.get("worker") != self.me or trial.state == TrialState.WAITING:
                    raise Lost
                if trial.state.is_finished():
                    return  # only the answer was lost
                for name, value in attrs.items():
                    self.storage.set_trial_user_attr(self._trial_id(number), name, value)
                self.study.tell(number, values, state=TrialState[state])

        self.patiently(tell)

    def hand_back(self, number: int) -> None:
        """Let a trial wait again, with its number and values, for whoever goes on with it."""

        def hand_back() -> None:
            with self._alone():
                if self.is_mine(number):
                    self._set_waiting(number)

        self.patiently(hand_back)

    def take_away(self, number: int, worker: str, reason: str, *, counts: bool) -> tuple[TakenAs, str] | None:
        """Take a trial from a process that is dead or gives no sign; return what became of it, and why.

        Where it `counts`, it is tried again at most `search.retries` times, and then failed with the reason. None:
        the process no longer had it.
        """
        with self._alone():
            trial_id = self._trial_id(number)
            trial = self.storage.get_trial(trial_id)
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("worker") != worker:
                return None
            retries = trial.user_attrs.get("retries", 0) + counts
            if retries > self.search.retries:
                reason = f"{reason}, at each of {retries} tries"
                self.storage.set_trial_user_attr(trial_id, "reason", reason)
                self.study.tell(number, state=TrialState.FAIL)
                return "failed", reason
            if not counts:
                self._set_waiting(number)
                return "waits", ""
            self.storage.set_trial_user_attr(trial_id, "retries", retries)
            self._set_waiting(number)
            return "lost", f"{reason}: tried again ({retries} of {self.search.retries})"

    def _set_waiting(self, number: int) -> None:
        # Not "failed, and the same again": another number would change what is drawn for later trials.
        self.storage.set_trial_state_values(self._trial_id(number), TrialState.WAITING)

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _alone(self) -> Any:
        return alone(self.search.storage, self.folder, self.lock_wait_s)
