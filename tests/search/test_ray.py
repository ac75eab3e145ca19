"""What a host does for a search on Ray, and what is refused before Ray is asked; no Ray runs here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from searching import Sweep, search_with
from training_recipes import recipe_with

from cnn_tuning.config import RayConfig, compose, to_plain
from cnn_tuning.errors import UserError
from cnn_tuning.search import ray_cluster, ray_host
from cnn_tuning.search.lost import end_run
from cnn_tuning.search.question import question_of
from cnn_tuning.search.ray_cluster import connect
from cnn_tuning.search.ray_host import UNFIT, Job, Seat
from cnn_tuning.stages.ray_training import train
from cnn_tuning.tracking import spool

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path):
    """Return a job that this host can do."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/meta.json").touch()
    (tmp_path / "mark").touch()
    return Job({"data": "data"}, str(tmp_path), str(tmp_path / "mark"), True, str(tmp_path / "log"))


@pytest.fixture
def script(monkeypatch):
    """Return a function that lets a script stand for the worker."""
    return lambda text: monkeypatch.setattr(ray_host, "COMMAND", ["/bin/sh", "-c", text])


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("cat >/dev/null; echo 'error: no disk' >&2; exit 1", (1, "no disk")),
        ("exit 0", (0, "")),
        ("kill -KILL $$", (-9, "")),
    ],
)
def test_it_is_told_how_the_worker_ended(job, script, text, ended):
    script(text)
    assert Seat().work(job) == ended


def test_the_worker_is_not_to_outlive_the_process_that_ray_ends(job, script):
    script("cat")
    Seat().work(job)
    assert json.loads(Path(job.log).read_text()) == {"data": "data", "boss": os.getpid()}


def test_asked_again_it_waits_for_the_same_worker_and_passes_signals_on(job, script):
    script(f"cat >/dev/null; echo began >>{job.log}.times; trap 'exit 143' TERM; while :; do sleep 0.05; done")
    seat, found = Seat(), []
    threads = [threading.Thread(target=lambda: found.append(seat.work(job))) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not Path(f"{job.log}.times").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # for the trap
    seat.send(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert [status for status, _ in found] == [143, 143]
    assert Path(f"{job.log}.times").read_text() == "began\n"


def test_one_that_was_asked_to_stop_does_not_begin(job, script):
    script(f"touch {job.log}.began")
    seat = Seat()
    seat.send(signal.SIGTERM)
    assert seat.work(job)[0] == 143
    assert not Path(f"{job.log}.began").exists()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("data/meta.json", r"no data in .*/data: share the project's folder with all hosts \(NFS, EFS\)"),
        ("mark", r"is not the search's own: share .* or set search.storage=postgresql://… and tracking.uri=http"),
    ],
)
def test_a_host_without_the_files_says_so(job, script, tmp_path, missing, told):
    script("exit 0")
    (tmp_path / missing).unlink()
    status, words = Seat().work(job)
    assert status == UNFIT
    assert re.search(told, words), words
    assert "\n" not in words


def test_a_host_without_the_project_says_so(job):
    status, words = Seat().work(dataclasses.replace(job, project="/nonexistent"))
    assert (status, words.split(":")[0]) == (UNFIT, "no folder /nonexistent")


def test_with_a_database_and_a_server_the_folder_may_be_the_hosts_own(job, script, tmp_path):
    script("exit 0")
    (tmp_path / "mark").unlink()
    assert Seat().work(dataclasses.replace(job, must_share=False))[0] == 0


def test_a_wrong_executor_is_told_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"search.executor: got 'rey', must be .*did you mean 'ray'"):
        compose(["search=quick", "search.executor=rey"], params=None, conf=ROOT / "conf")
    with pytest.raises(UserError, match=r"search.ray.num_gpu: unknown name; did you mean 'num_gpus'"):
        compose(["search=quick", "search.ray.num_gpu=1"], params=None, conf=ROOT / "conf")


def test_where_trials_run_is_no_part_of_the_question():
    here, there = search_with(), search_with(executor="ray", ray={"num_gpus": 0.5, "address": "auto"})
    assert to_plain(here) != to_plain(there)
    recipe = recipe_with([])
    assert question_of(here, recipe, "d", "c", 1.0) == question_of(there, recipe, "d", "c", 2.0)


def test_without_ray_it_is_said_what_to_install(tmp_path, digits_data, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else found(name, *a))
    with pytest.raises(UserError, match=r"Ray is not installed: pip install 'cnn-tuning\[ray\]'"):
        Sweep(tmp_path, digits_data, search_with(executor="ray")).run()
    assert not (tmp_path / "search").exists()


def test_more_than_one_gpu_is_a_whole_number(tmp_path, digits_data):
    with pytest.raises(UserError, match=r"search.ray.num_gpus: got 1.5, above 1 it must be a whole number"):
        Sweep(tmp_path, digits_data, search_with(executor="ray", ray={"num_gpus": 1.5})).run()


def test_a_cluster_without_its_token_is_not_asked(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    loaded = set(sys.modules)
    with pytest.raises(UserError, match=r"address=auto: no token for it: set RAY_AUTH_TOKEN_PATH to a copy"):
        connect(RayConfig(address="auto"))
    assert "ray" not in set(sys.modules) - loaded


def test_a_training_of_one_process_is_refused_before_ray_is_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ray_cluster, "connect", asked.append)
    head = ["experiment=digits", "model=resnet50", "augment=none", "trainer.finetune={trainable: head}"]
    with pytest.raises(UserError, match="is trained by one process: start it without a launcher"):
        train(head, RayConfig(), workers=2, retries=0, data=tmp_path, out=tmp_path)
    assert not asked


def test_the_runs_of_a_worker_that_is_lost_end(tmp_path):
    for key, host, pid, created, number in (
        ("1", "there", 7, 1.0, "0"),
        ("2", "there", 8, 1.0, "0"),
        ("3", "here", 7, 1.0, "0"),
        ("4", "there", 7, 99.0, "0"),  # of a host that was started again
        ("5", "there", 7, 1.0, "1"),
    ):
        writer = spool.Writer(tmp_path, key)
        writer.append(
            "start", host=host, pid=pid, created=created, tags={"trial.number": number}, price_per_hour=2.0
        )
        writer.close()
    end_run(tmp_path, "there/ray-1:7:1.00", 0, "lost", "its host is gone: tried again (1 of 2)")
    assert [spool.is_ending(tmp_path, key) for key in "12345"] == [True, False, False, False, False]
