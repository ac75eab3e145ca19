"""A process that takes trials of a search and trains them: `python -m cnn_tuning.search.worker < SPEC.json`.

It ends with status 0 when no trial waits, and with 128 + signal when it was asked to stop: what it trained is
then saved and the trial waits for another. What it prints goes to a log beside the study.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cnn_tuning.config import DiagnosisConfig, Recipe, SearchConfig, TrackingConfig, flatten, to_plain, validate
from cnn_tuning.errors import UserError, redact
from cnn_tuning.machine import end_with, prepare_process
from cnn_tuning.search.signs import Asked, Beat

if TYPE_CHECKING:
    import optuna

    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.search.space import Chosen
    from cnn_tuning.search.study import SharedStudy
    from cnn_tuning.search.trial import Spent
    from cnn_tuning.tracking.run import Run

# What Optuna's states are called in tags, and what MLflow makes of them.
STATES: dict[str, tuple[str, Literal["FINISHED", "FAILED", "KILLED"]]] = {
    "COMPLETE": ("complete", "FINISHED"),
    "PRUNED": ("pruned", "KILLED"),
    "FAIL": ("failed", "FAILED"),
}


@dataclass(frozen=True)
class Spec:
    """What a worker is told on its standard input.

    `parent` is the key of the search's run, `boss` the process that it is not to outlive, `tag` part of its name.
    """

    search: SearchConfig
    recipe: Recipe
    diagnosis: DiagnosisConfig
    tracking: TrackingConfig
    study: str
    folder: str
    data: str
    parent: str
    boss: int
    tag: str = ""


def work(spec: Spec) -> None:
    """Train trials until none waits; exits with 128 + signal where it was asked to stop."""
    asked = Asked()
    # torch and all: before a trial is taken, which then lies idle while they are loaded.
    import cnn_tuning.search.trial  # noqa: F401
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.search.storage import PATIENCE_S
    from cnn_tuning.search.study import SharedStudy, this_process

    study = SharedStudy(
        spec.search,
        spec.recipe,
        spec.study,
        Path(spec.folder),
        me=this_process(spec.tag),
        patience_s=lambda: 0.0 if asked.to_stop() else PATIENCE_S,
    )
    desk = _Desk(spec, study, PackedData.open(Path(spec.data)), asked)
    while not asked.to_stop() and (taken := study.take()) is not None:
        desk.work_on(*taken)
        asked.listen()
        gc.collect()
    if asked.to_stop():
        sys.exit(128 + asked.to_stop())


@dataclass(frozen=True)
class _Desk:
    """What a worker has at hand for any trial."""

    spec: Spec
    study: SharedStudy
    data: PackedData
    asked: Asked

    def work_on(self, trial: optuna.Trial, chosen: Chosen) -> None:
        """Train a trial and tell the study how it ended; a SystemExit goes on once the trial waits again."""
        from cnn_tuning.search.study import Lost
        from cnn_tuning.search.trial import Spent

        number, spent = trial.number, Spent()
        tracked = self._run_of(number)
        with Beat(self.study, number, self.study.seconds(number)) as beat:
            try:
                ended, values, reason = self._train(trial, chosen, spent, tracked)
                attrs = spent.attrs() | self._cost(beat.seconds()) | {"run": tracked.key}
                self.study.tell(number, ended, values, attrs | ({"reason": reason} if reason else {}))
            except Lost:
                _end_early(tracked, "lost")
                print(f"trial {number}: another process has it now", file=sys.stderr)
                return
            except BaseException as error:
                if isinstance(error, SystemExit):
                    self.study.hand_back(number)
                _end_early(tracked, "interrupted")
                raise
        _record(tracked, self.spec.search, ended, values, reason)
        shutil.rmtree(self._state(number), ignore_errors=True)

    def _train(
        self, trial: optuna.Trial, chosen: Chosen, spent: Spent, tracked: Run
    ) -> tuple[Literal["COMPLETE", "PRUNED", "FAIL"], list[float] | None, str]:
        """Return how a trial ended, its values, and why it has none."""
        from optuna import TrialPruned

        from cnn_tuning.search.space import trial_recipe
        from cnn_tuning.search.storage import StorageGone
        from cnn_tuning.search.study import Lost
        from cnn_tuning.search.trial import run_trial

        search = self.spec.search
        try:
            recipe = trial_recipe(search, self.spec.recipe, chosen)
            tracked.log_params(flatten(to_plain(recipe)))
            values = run_trial(
                search,
                recipe,
                self.data,
                self._state(trial.number),
                name=f"trial {trial.number}",
                spent=spent,
                report=lambda value, step: self.study.report(trial, value, step),
                tracked=tracked,
                pass_on=self.asked.pass_on,
                diagnosis=self.spec.diagnosis,
                price_per_hour=self.spec.tracking.price_per_hour,
            )
        except TrialPruned as pruned:
            return "PRUNED", None, str(pruned)
        except (Lost, StorageGone):
            raise
        except Exception as error:
            reason = _reason(error)
            print(f"trial {trial.number} failed: {reason}", file=sys.stderr)
            return "FAIL", None, reason
        for objective, value in zip(search.objectives, values, strict=True):
            if not math.isfinite(value):
                return "FAIL", None, f"{objective.metric} is {value}"
        return "COMPLETE", values, ""

    def _run_of(self, number: int) -> Run:
        from cnn_tuning.tracking.run import Run

        return Run.start(
            # The search's own run has found the store; a server that is gone since then stops no trial.
            replace(self.spec.tracking, on_unreachable="spool", price_per_hour=self._price()),
            name=f"trial {number}",
            kind="trial",
            params={},
            tags={"trial.number": str(number), "study": self.spec.study},
            parent=self.spec.parent,
            waits=False,
        )

    def _cost(self, seconds: float) -> dict[str, float]:
        return {"seconds": round(seconds, 3), "usd": seconds / 3600 * self._price()}

    def _price(self) -> float:
        """Return the price per hour: workers side by side share what the machine costs."""
        return self.spec.tracking.price_per_hour / self.spec.search.workers

    def _state(self, number: int) -> Path:
        return Path(self.spec.folder) / "trials" / self.spec.study / str(number)


def _reason(error: Exception) -> str:
    lines = redact(str(error)).strip().splitlines()
    kind = "" if isinstance(error, UserError) and lines else f"{type(error).__name__}: "
    return (kind + (lines[0] if lines else "")).removesuffix(": ")[:500]


def _end_early(tracked: Run, state: str) -> None:
    tracked.set_tags({"trial.state": state})
    tracked.finish("KILLED")


def _record(tracked: Run, search: SearchConfig, ended: str, values: list[float] | None, reason: str) -> None:
    state, status = STATES[ended]
    tracked.set_tags({"trial.state": state, **({"trial.reason": reason} if reason else {})})
    if values is not None:
        tracked.log_metrics({f"objective/{o.metric}": v for o, v in zip(search.objectives, values, strict=True)})
    tracked.finish(status, error=reason if ended == "FAIL" else "")


def main() -> None:
    """Work by the specification on the standard input."""
    spec = validate(Spec, json.load(sys.stdin))
    prepare_process()
    end_with(spec.boss)
    try:
        work(spec)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
