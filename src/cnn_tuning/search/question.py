"""What a study answers: a search, a recipe, data and code come in; a name that changes with them goes out."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import Recipe, SearchConfig, flatten, needs_price, to_plain
from cnn_tuning.search.space import common_recipe

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

# What may change without being another question: how much, by whom, and what is made of it afterwards.
FREE = ("name", "budget", "workers", "executor", "ray", "storage", "heartbeat_s", "grace_s", "retries",
        "importance", "refit_seeds")  # fmt: skip
ATTR = "question"


def question_of(
    search: SearchConfig, recipe: Recipe, data_digest: str, code: str, price_per_hour: float
) -> dict[str, Any]:
    """Return by dotted name all that decides a study's trials; the price only where it decides which is best."""
    asked = {name: value for name, value in to_plain(search).items() if name not in FREE}
    price = {"price_per_hour": price_per_hour} if needs_price(search) else {}
    # The recipe with the settings: what they replace, such as the epochs of the refit, is another matter.
    common = to_plain(common_recipe(search, recipe))
    return flatten({**common, "search": asked, "data": data_digest, "code": code, **price})


def study_name(search: SearchConfig, question: dict[str, Any]) -> str:
    """Return the name of the study that answers a question."""
    return f"{search.name}-{hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]}"


def explain_others(storage: BaseStorage, name: str, question: dict[str, Any]) -> list[str]:
    """Say of each unfinished study of the same search why it is not the one that goes on."""
    lines = []
    for other in storage.get_all_studies():
        theirs = other.user_attrs.get(ATTR)
        if other.study_name == name or other.study_name[:-16] != name[:-16] or not isinstance(theirs, dict):
            continue
        trials = storage.get_all_trials(storage.get_study_id_from_name(other.study_name), deepcopy=False)
        done = sum(trial.state.is_finished() for trial in trials)
        if done == len(trials):
            continue
        # As the storage gives it back: tuples are lists.
        ours = json.loads(json.dumps(question))
        changed = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
        what = ", ".join(f"{k} ({_short(theirs.get(k))} → {_short(ours.get(k))})" for k in changed)
        lines.append(f"not continuing {other.study_name} ({done} of {len(trials)} trials done): changed {what}")
    return lines


def note(study: optuna.Study, question: dict[str, Any]) -> None:
    """Keep the question with its study."""
    if ATTR not in study.user_attrs:
        study.set_user_attr(ATTR, question)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:8] + "…"
