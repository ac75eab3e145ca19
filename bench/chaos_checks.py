"""What has to hold of a run after a fault and at its end; each check returns what was lost, one line each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from chaos_place import Place

# Names of what is written beside and renamed, or in the way of being received.
TEMPORARY = re.compile(r"\.(partial|part|tmp|new|kept)$|^tmp|\.part\.json$|^\.probe$|^\.unpacked-|^\.\w+\.new$")
RESULTS = (
    "results/evaluation/metrics.json",
    "results/ablation/metrics.json",
    "results/search/metrics.json",
    "results/search/best.json",
)
WEIGHTS = ("models/baseline/weights.safetensors", "models/tuned/weights.safetensors")
TIMES = re.compile(r"second|minute|hour|time|usd|cost|memory")
PREDICT = """
import json, sys
from pathlib import Path
import numpy as np
from cnn_tuning.serving.predictor import Predictor
from cnn_tuning.serving.server import find
answers = {}
images = np.load("data/prepared/test/images.npy")[:4]
predictor = Predictor(find(sys.argv[1], sys.argv[2]).bundle)
print(json.dumps(predictor.probabilities(images).tolist()))
"""


def timeless(tree: Any) -> Any:
    """Return results without what differs from one run to the next."""
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if not TIMES.search(k)}
    return tree


def results(project: Path) -> dict[str, Any]:
    """Return final metrics and the hashes of final weights; a missing file is None."""
    found: dict[str, Any] = {}
    for name in RESULTS:
        file = project / name
        found[name] = timeless(json.loads(file.read_text())) if file.exists() else None
    for name in WEIGHTS:
        file = project / name
        found[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    return found


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Say which results are not those of an undisturbed run."""
    return [
        f"{name} differs from an undisturbed run's"
        for name in expected
        if timeless(got.get(name)) != timeless(expected[name])
    ]


# --- dvc.lock --------------------------------------------------------------------------------------------


def false_claims(project: Path, *, cut: Path | None = None) -> list[str]:
    """Say what dvc.lock tells to be done and is not there with its hash: in the cache, and in its place.

    In its place an output may be missing (a stage that runs again removes it first), or be the `cut` one.
    """
    try:
        lock = yaml.safe_load((project / "dvc.lock").read_text()) or {}
    except FileNotFoundError:
        return []
    except yaml.YAMLError:
        return ["dvc.lock does not read"]
    lost = []
    for stage, entry in lock.get("stages", {}).items():
        for out in entry.get("outs", ()):
            kept = out["path"] != "params.lock.yaml"
            problems = _claim(project, out["path"], out["md5"], kept=kept, cut=cut)
            lost += [f"dvc.lock claims {stage}: {problem}" for problem in problems]
    return lost


def _claim(project: Path, path: str, md5: str, *, kept: bool, cut: Path | None) -> Iterator[str]:
    files = {path: md5}
    if md5.endswith(".dir"):
        listing = _cached(project, md5)
        if not listing.exists() or _md5(listing) != md5.removesuffix(".dir"):
            yield f"{path}: its listing is not in the cache"
            return
        files = {f"{path}/{entry['relpath']}": entry["md5"] for entry in json.loads(listing.read_text())}
    for name, digest in files.items():
        if kept and (not _cached(project, digest).exists() or _md5(_cached(project, digest)) != digest):
            yield f"{name}: not whole in the cache"
        file = project / name
        if file.exists() and _md5(file) != digest and file != cut:
            yield f"{name}: another file than claimed"


def _cached(project: Path, md5: str) -> Path:
    return project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# --- at the end ------------------------------------------------------------------------------------------


def left_running(store: Path, project: Path) -> list[str]:
    """Name runs of the store and trials of the search that did not end."""
    connection = sqlite3.connect(store)
    try:
        rows = connection.execute("SELECT name FROM runs WHERE status NOT IN ('FINISHED', 'FAILED', 'KILLED')")
        lost = [f"run {name} is left RUNNING in the store" for (name,) in rows]
    finally:
        connection.close()
    for journal in (project / ".state").glob("**/journal.log"):
        lost += [f"trial {number} is left RUNNING in {journal.name}" for number in _running_trials(journal)]
    return lost


def _running_trials(journal: Path) -> list[int]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    return [
        trial.number
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id, deepcopy=False)
        if trial.state == optuna.trial.TrialState.RUNNING
    ]


def curve(store: Path) -> list[int]:
    """Return how many steps of val/loss each of the evaluated models' trainings has in the store."""
    connection = sqlite3.connect(store)
    try:
        return sorted(
            steps
            for (steps,) in connection.execute(
                "SELECT count(DISTINCT m.step) FROM metrics m"
                " JOIN tags t USING (run_uuid) JOIN runs r USING (run_uuid)"
                " WHERE m.key = 'val/loss' AND t.key = 'cnn_tuning.kind' AND t.value IN ('train', 'refit')"
                " AND r.status = 'FINISHED' GROUP BY m.run_uuid"
            )
        )
    finally:
        connection.close()


def temporary_files(folder: Path) -> list[str]:
    """Name what looks like a file under way; Git's and DVC's own folders of temporary files are theirs."""
    found = []
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        if ".git" not in inside and inside[:2] != (".dvc", "tmp") and TEMPORARY.search(path.name):
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def answers(place: Place, uri: str) -> Any:
    """Return what the champion says of four test images; None with a reason printed where it does not load."""
    command = [sys.executable, "-c", PREDICT, "models:/smoke-classifier@champion", uri]
    environment = {k: v for k, v in place.environment.items() if k != "LD_PRELOAD"}
    done = subprocess.run(command, cwd=place.project, env=environment, capture_output=True, text=True)
    with contextlib.suppress(IndexError, ValueError):
        return json.loads(done.stdout.splitlines()[-1])
    return (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]
