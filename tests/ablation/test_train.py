"""Training the arms: each is trained once, by one process, whatever is interrupted or killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from children import below
from filelock import FileLock
from pytorch_lightning.callbacks import Callback

from cnn_tuning.ablation.settle import settle
from cnn_tuning.ablation.train import Job, jobs_of, missing, results_of, train_jobs
from cnn_tuning.ablation.worker import share
from cnn_tuning.config import DiagnosisConfig, QuestionConfig, RuleConfig, flatten, patch, to_plain
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted, State

SETTINGS = {"trainer.max_epochs": 1, "trainer.batch_size": 256}
QUESTION = QuestionConfig("Does it help?", {"model.dropout": ["none", "both"]}, SETTINGS, seeds=2)


@pytest.fixture
def jobs(recipe):
    return jobs_of("dropout", QUESTION, recipe, 1)


def train(jobs, packed, folder, tracking):
    parent = "20260101-000000-ablate-00000000"
    train_jobs(jobs, packed, folder, diagnosis=DiagnosisConfig("none"), tracking=tracking(), parent=parent)


def test_each_arm_is_trained_once_with_each_seed(jobs, packed, tmp_path, tracking, store_db, rows):
    assert [(job.arm, job.recipe.seed) for job in jobs] == [
        ("dropout=none", 0), ("dropout=both", 0), ("dropout=none", 1), ("dropout=both", 1),
    ]  # fmt: skip
    train(jobs, packed, tmp_path / "arms", tracking)
    results = results_of(jobs, packed, tmp_path / "arms", 3600.0, DiagnosisConfig("none"))
    images = len(packed.split("val"))
    for result in results:
        assert result.right.shape == (images,)
        assert result.val_accuracy == result.right.mean()
        assert result.usd == pytest.approx(result.seconds)
        assert result.seconds > 0
        assert (result.epochs, result.updates) == (1, 6)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "arms").glob("*/result.json")}
    assert len(written) == 4
    # Asked again, also as part of another question, nothing is trained.
    other = jobs_of(
        "other", QuestionConfig("?", {"model.dropout": ["both", "none"]}, SETTINGS, 1), jobs[0].recipe, 1
    )
    train([*jobs, *other], packed, tmp_path / "arms", tracking)
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "arms").glob("*/result.json")}
    assert missing([*jobs, *other], packed, tmp_path / "arms") == 0
    assert not list((tmp_path / "arms").glob("*/unfinished"))


def test_another_recipe_or_other_data_is_another_arm(jobs, packed, tmp_path, tracking):
    train(jobs[:1], packed, tmp_path / "arms", tracking)
    changed = [patch(jobs[0].recipe, {"optimizer.learning_rate": 0.02}), patch(jobs[0].recipe, {"seed": 9})]
    more = [type(jobs[0])("q", "a", recipe, "1/1") for recipe in changed]
    assert missing([jobs[0], *more], packed, tmp_path / "arms") == 2


def test_findings_are_those_of_the_thresholds_of_now(jobs, packed, tmp_path, tracking):
    train(jobs[:1], packed, tmp_path / "arms", tracking)

    def found(ratio):
        rules = {"class_imbalance": RuleConfig(thresholds={"ratio": ratio})}
        (result,) = results_of(jobs[:1], packed, tmp_path / "arms", 0.0, DiagnosisConfig("test", rules=rules))
        return result.findings

    assert (found(10.0), found(1.0)) == ((), ("class_imbalance",))


def test_the_batch_that_memory_sufficed_for_is_kept(jobs, packed, tmp_path, tracking, monkeypatch):
    monkeypatch.setattr("cnn_tuning.ablation.train.fit", with_memory_for(128))
    halving = Job("q", "a", patch(jobs[0].recipe, {"trainer.on_out_of_memory": "halve_batch"}), "1/1")
    train([halving], packed, tmp_path / "arms", tracking)
    (result,) = results_of([halving], packed, tmp_path / "arms", 0.0, DiagnosisConfig("none"))
    assert result.smaller_batch == 128


def test_an_arm_that_fails_is_a_result_and_the_others_go_on(recipe, packed, tmp_path, tracking, capfd):
    question = QuestionConfig("?", {"optimizer.learning_rate": [0.01, 1e30]}, SETTINGS, seeds=1)
    jobs = jobs_of("rate", question, recipe, 1)
    train(list(reversed(jobs)), packed, tmp_path / "arms", tracking)
    good, bad = results_of(jobs, packed, tmp_path / "arms", 0.0, DiagnosisConfig("none"))
    assert good.failure == ""
    assert good.right is not None
    assert "no longer finite at step" in bad.failure
    assert bad.right is None
    assert "no longer finite" in capfd.readouterr().err


def test_several_workers_need_their_share_of_the_cores(recipe):
    free = patch(recipe, {"trainer.threads": None})
    cores = len(os.sched_getaffinity(0))
    assert jobs_of("q", QUESTION, free, 1)[0].recipe.trainer.threads is None
    assert jobs_of("q", QUESTION, free, 2)[0].recipe.trainer.threads == max(1, cores // 2)
    assert jobs_of("q", QUESTION, recipe, 2)[0].recipe.trainer.threads == recipe.trainer.threads


def test_an_interrupted_ablation_goes_on_in_mid_training(recipe, packed, tmp_path, tracking, capfd):
    long = QuestionConfig("?", {"model.dropout": ["none", "both"]}, {"trainer.max_epochs": 8}, seeds=1)
    jobs = jobs_of("dropout", long, recipe, 1)[:1]
    train(jobs, packed, tmp_path / "whole", tracking)

    def interrupt():
        while not list((tmp_path / "cut").glob("*/unfinished/*/recipe.json")):
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    was = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until fit takes it over
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(Interrupted) as caught:
            train(jobs, packed, tmp_path / "cut", tracking)
    finally:
        signal.signal(signal.SIGTERM, was)
    assert caught.value.saved is not None
    assert missing(jobs, packed, tmp_path / "cut") == 1
    capfd.readouterr()
    train(jobs, packed, tmp_path / "cut", tracking)
    assert "going on from" in capfd.readouterr().err
    assert len(list((tmp_path / "spool").glob("*.jsonl"))) == 2  # what was cut off and went on is one run
    none = DiagnosisConfig("none")
    both = (results_of(jobs, packed, tmp_path / n, 0.0, none) for n in ("whole", "cut"))
    for whole, cut in zip(*both, strict=True):
        assert np.array_equal(whole.right, cut.right)
        assert whole.val_loss == cut.val_loss


def test_who_waits_for_anothers_arm_does_so_at_rest(jobs, packed, tmp_path, tracking, monkeypatch):
    """Another process trains the last arm: this one looks now and then, and does not spin."""
    others = FileLock(State(tmp_path / "arms", jobs[0].recipe, packed.meta.digest).path / "lock")
    Path(others.lock_file).parent.mkdir(parents=True)
    rested = []

    def made_meanwhile(seconds=0.0):
        rested.append(seconds)
        (Path(others.lock_file).parent / "result.json").write_text('{"failure": "diverged", "seconds": 1}')

    monkeypatch.setattr("cnn_tuning.ablation.settle.time", SimpleNamespace(sleep=made_meanwhile), raising=False)
    at_last = threading.Timer(20, made_meanwhile)  # so that one that spins ends, too
    at_last.start()
    with Run.start(tracking(), name="ablate", kind="ablate", params={}) as run, others:
        none = DiagnosisConfig("none")
        (result,) = settle(jobs[:1], packed, tmp_path / "arms", workers=1, diagnosis=none,
                           tracking=tracking(), tracked=run)  # fmt: skip
    at_last.cancel()
    assert result.failure == "diverged"
    assert rested[0] > 0


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(recipe, packed, tmp_path, tracking):
    jobs = jobs_of("dropout", QUESTION, recipe, 1)
    folder = tmp_path / "arms"
    folder.mkdir()
    spec = {
        "jobs": [{**vars(job), "recipe": to_plain(job.recipe)} for job in jobs],
        "data": str(packed.path),
        "folder": str(folder),
        "diagnosis": {"name": "none"},
        "tracking": to_plain(tracking()),
        "parent": "20260101-000000-ablate-00000000",
    }
    killed = []

    def kill_the_first():
        while not list(folder.glob("*/unfinished/*/recipe.json")):
            time.sleep(0.01)
        (worker,) = workers()
        worker.kill()
        killed.append(worker.pid)

    thread = threading.Thread(target=kill_the_first, daemon=True)
    thread.start()
    with share(1, tmp_path / "spec.json", **spec):
        thread.join(120)
        assert killed
    assert missing(jobs, packed, folder) > 0
    with share(1, tmp_path / "spec.json", **spec):
        train(jobs, packed, folder, tracking)
    assert missing(jobs, packed, folder) == 0
    recipes = [json.loads(p.read_text())["recipe"] for p in folder.glob("*/result.json")]
    assert len(recipes) == len(jobs)
    assert all(flatten(to_plain(job.recipe)) in recipes for job in jobs)
    assert not workers()


def with_memory_for(images):
    """Return `fit` on a machine whose memory suffices for so many images."""

    class Full(Callback):
        def on_train_batch_start(self, trainer, module, batch, *_):
            if len(batch[1]) > images:
                raise MemoryError("no memory")

    return lambda recipe, *rest, callbacks, **more: fit(recipe, *rest, callbacks=[*callbacks, Full()], **more)


def workers() -> list[psutil.Process]:
    """Return the living workers that this process has started."""
    return [one for one, command in below() if "cnn_tuning.ablation.worker" in command]
