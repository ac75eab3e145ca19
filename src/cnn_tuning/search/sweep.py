"""A search from its start to its end: a space and a recipe come in, workers are watched, a study goes out."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import DiagnosisConfig, Recipe, SearchConfig, TrackingConfig, patch, side_by_side
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.search.lost import end_run
from cnn_tuning.search.progress import SearchProgress
from cnn_tuning.search.question import explain_others, note, question_of, study_name
from cnn_tuning.search.staff import Staff
from cnn_tuning.search.storage import PATIENCE_S, is_passing, unreachable
from cnn_tuning.search.study import SharedStudy, this_process
from cnn_tuning.search.watch import Watch
from cnn_tuning.search.worker import Spec
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.resume import Interrupted, code_digest

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from cnn_tuning.search.ray_staff import RayStaff

LOOK_S = 0.3
LOCK_WAIT_S = 2.0
NOTE_S = 5.0  # how often the time spent is noted
# Workers that end one after the other without a single trial done: something is wrong with all of them.
FRUITLESS = 3
SPENT = "seconds "  # the study's attributes of the time spent begin with it, a process's name follows


def run_search(
    search: SearchConfig,
    recipe: Recipe,
    data_folder: Path,
    folder: Path,
    *,
    diagnosis: DiagnosisConfig,
    tracked: Run,
    tracking: TrackingConfig,
) -> optuna.Study:
    """Run the trials that the search's budget allows and no process has run, and return the study.

    `recipe` is the experiment's; `tracked` the run that trials belong to. State is kept in `folder`. Where the
    time or money is spent before all trials are done, the others wait for a larger budget.

    Raises:
        Interrupted: a signal came; the trials under way wait with what they have trained.
        UserError: the storage does not answer, or no worker comes up.
    """
    if search.executor == "ray":
        from cnn_tuning.search.ray_cluster import check_ray

        check_ray(search.ray)
    data = PackedData.open(data_folder)
    _make_folder(folder)
    question = question_of(search, recipe, data.meta.digest, code_digest(), tracking.price_per_hour)
    name = study_name(search, question)
    tracked.set_tags({"study": name})
    recipe = _with_share(search, recipe)
    spec = Spec(search, recipe, diagnosis, tracking, name, str(folder), str(data_folder), tracked.key, os.getpid())
    try:
        study = SharedStudy(search, recipe, name, folder, me=this_process(), patience_s=lambda: 0.0)
        _prepare(study, question)
        Sweep(study, spec).run()
    except Exception as error:
        if not is_passing(error):
            raise
        raise unreachable(search.storage, error) from None
    return study.study


def _with_share(search: SearchConfig, recipe: Recipe) -> Recipe:
    """Return the recipe with a worker's share of this machine; of Ray's cores it is known before the host is."""
    here = search.executor == "local" or search.ray.address is None
    if search.executor == "ray" and recipe.trainer.threads is None:
        recipe = patch(recipe, {"trainer.threads": max(1, int(search.ray.num_cpus))})
    return side_by_side(recipe, search.workers) if here else recipe


def _staff(search: SearchConfig, folder: Path, spec: Spec, say: Callable[[str], None]) -> Staff | RayStaff:
    if search.executor == "local":
        return Staff(search.workers, folder, spec)
    from cnn_tuning.search.ray_staff import RayStaff

    return RayStaff(search.workers, folder, spec, say)


def _prepare(study: SharedStudy, question: dict[str, Any]) -> None:
    for line in explain_others(study.storage, study.name, question):
        print(f"search: {line}", file=sys.stderr)
    note(study.study, question)
    left_out = study.provide_trials()
    if left_out:
        print(f"search: {left_out} points of the grid are left out (search.budget.trials)", file=sys.stderr)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): mend its permissions first") from None


class Sweep:
    """Watches over one search: hires workers, takes trials from dead ones, minds the budget and signals."""

    def __init__(self, study: SharedStudy, spec: Spec) -> None:
        self.study, self.spec, self.search = study, spec, spec.search
        study.lock_wait_s = LOCK_WAIT_S  # a worker may stop that has a lock: to be seen, and ended
        self.watch = Watch(self.search.grace_s)
        self.progress = SearchProgress(self.search, study.trials())
        self.staff = _staff(self.search, study.folder, spec, self.progress.say)
        self.began = self.noted = time.monotonic()
        self.before_s = self._spent_by_others()
        self.signum = self.judged = self.done = self.fruitless = 0
        self.silent_since: float | None = None

    def run(self) -> None:
        """Return when all trials are done or the budget is spent."""
        self.progress.show(self.study.trials())
        with self._listening():
            try:
                self._look_after()
            finally:
                self.staff.ask_to_stop()
                self.staff.wait()
                self._put_back()
                self.staff.close()
                self.progress.close()
        if self.signum:
            raise Interrupted(self.signum, self.study.folder)

    def _look_after(self) -> None:
        while not self.signum:
            self.staff.alive()  # buries the dead; the look after it shows all that they did
            trials = self._look()
            if trials is not None:
                self.progress.show(trials)
                self._judge_failures(trials)
                self._take_from_dead([t for t in trials if t.state.name == "RUNNING"])
                waiting = sum(t.state.name == "WAITING" for t in trials)
                if all(t.state.is_finished() for t in trials) or self._is_spent():
                    return
                self._hire(trials, waiting)
            time.sleep(LOOK_S)

    def _look(self) -> list[FrozenTrial] | None:
        """Return the trials, or None while the storage does not answer."""
        try:
            trials = self.study.trials()
        except Exception as error:
            if not is_passing(error):
                raise
            now = time.monotonic()
            if self.silent_since is None:
                self.silent_since = now
                self.progress.say(f"waits: {unreachable(self.search.storage, error)}")
            if now - self.silent_since > PATIENCE_S:
                raise unreachable(self.search.storage, error) from None
            return None
        if self.silent_since is not None:
            self.silent_since = None
            self.progress.say("goes on: the storage answers again")
        self._note_time()
        return trials

    def _take_from_dead(self, running: Sequence[FrozenTrial]) -> None:
        silent = {trial.number for trial in self.watch.silent(running, time.monotonic())}
        for trial in running:
            worker = trial.user_attrs["worker"]
            if self.staff.is_gone(worker):
                known = self.staff.of(worker)
                # Meanwhile a second signal may have ended it, which is not the trial's failure.
                counts = not self.signum
                self._take_away(trial, f"its worker {known.fate() if known else 'is gone'}", counts=counts)
            elif trial.number in silent:
                self.staff.end(worker)
                self._take_away(
                    trial, f"its worker gave no sign of life for {self.search.grace_s:g} s", counts=True
                )

    def _take_away(self, trial: FrozenTrial, reason: str, *, counts: bool) -> None:
        worker = trial.user_attrs["worker"]
        try:
            taken = self.study.take_away(trial.number, worker, reason, counts=counts)
        except Exception as error:
            if not is_passing(error):
                raise
            return  # at the next look
        if taken is None:
            return
        became, why = taken
        if counts:
            self.progress.say(f"trial {trial.number}: {'failed: ' if became == 'failed' else ''}{why}")
        if self.staff.is_gone(worker):  # what is stopped on another host may still write
            end_run(Path(self.spec.tracking.spool), worker, trial.number, became, why)

    def _hire(self, trials: Sequence[FrozenTrial], waiting: int) -> None:
        alive = self.staff.alive()
        busy = {t.user_attrs.get("worker") for t in trials if t.state.name == "RUNNING"}
        idle = sum(not any(w.has(name) for name in busy if name) for w in alive)
        for _ in range(min(self.search.workers - len(alive), waiting - idle)):
            if not self.signum:
                self.staff.hire()

    def _judge_failures(self, trials: Sequence[FrozenTrial]) -> None:
        """Give up where workers fail one after the other and no trial gets done: the fault is no trial's."""
        new, self.judged = self.staff.left[self.judged :], len(self.staff.left)
        done = sum(t.state.is_finished() for t in trials)
        if done != self.done:
            self.done, self.fruitless = done, 0
        names = [t.user_attrs.get("worker", "") for t in trials]
        for worker in new:
            had_one, status = any(map(worker.has, names)), worker.status or 0
            # A trial's own error is told as such; a worker's own status 1 has another cause.
            self.fruitless += status == 1 or (status < 0 and not had_one)
        if self.fruitless >= FRUITLESS:
            raise UserError(
                f"{FRUITLESS} workers failed and no trial got done: {new[-1].fate()}; see {new[-1].log}"
            )

    def _is_spent(self) -> bool:
        """Return whether the time or the money is spent, and say so."""
        budget, price = self.search.budget, self.spec.tracking.price_per_hour
        seconds = self.before_s + time.monotonic() - self.began
        minutes_over = budget.minutes is not None and seconds >= 60 * budget.minutes
        dollars_over = budget.dollars is not None and seconds / 3600 * price >= budget.dollars
        if minutes_over or dollars_over:
            spent = f"{budget.minutes:g} minutes" if minutes_over else f"{budget.dollars:g} US dollars"
            self.progress.say(f"ends: its budget of {spent} is spent; a larger one goes on from here")
        return minutes_over or dollars_over

    def _note_time(self) -> None:
        """Keep the time spent in the study, for whoever goes on with it."""
        now = time.monotonic()
        if now - self.noted < NOTE_S:
            return
        try:
            self.study.study.set_user_attr(f"{SPENT}{self.study.me}", round(now - self.began, 1))
            self.before_s = self._spent_by_others()
        except Exception as error:
            if not is_passing(error):
                raise  # else at a later look: it may be a worker that is stopped and holds a lock
        else:
            self.noted = now

    def _spent_by_others(self) -> float:
        """Return the seconds that searches before this one, or beside it, took for this study."""
        attrs = self.study.study.user_attrs
        own = f"{SPENT}{self.study.me}"
        return sum(value for name, value in attrs.items() if name.startswith(SPENT) and name != own)

    def _put_back(self) -> None:
        """Let the trials of processes that are known to be dead wait: none is left running."""
        try:
            self.noted = 0.0
            self._note_time()
            for trial in self.study.trials():
                if trial.state.name == "RUNNING" and self.staff.is_gone(trial.user_attrs["worker"]):
                    self._take_away(trial, "", counts=False)
        except Exception as error:  # of a storage that is gone: the next start puts them back
            if not is_passing(error):
                raise

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT: the first asks the workers to save and stop, the second ends them at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            self.staff.kill()
            os.write(2, b"search: the workers are ended\n")
        elif signum == signal.SIGINT:
            # Not through the bar's console: its lock may be held by what the signal came into.
            os.write(
                2, b"search: stopping; workers save what they have trained (again: at once, saving nothing)\n"
            )
        self.signum = self.signum or signum
