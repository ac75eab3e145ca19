"""Rules of the profile: real fits that are sick in one way, and made-up times for what no fit here can show."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from training_recipes import CONF, recipe_with

from cnn_tuning.config import Recipe, compose, flatten, patch, select, to_plain
from cnn_tuning.data import batches
from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.recording import Curves, Recording, Times
from cnn_tuning.diagnosis.rules import RULES
from cnn_tuning.diagnosis.stopwatch import Stopwatch
from cnn_tuning.tracking import spool as spools
from cnn_tuning.tracking.system import read_samples, sampling, system_file
from cnn_tuning.training.fit import fit

CONFIG = compose(["experiment=digits"], params=None, conf=CONF)
RECIPE = select(Recipe, CONFIG)
NAMES = [name for name, rule in RULES.items() if rule.__module__.rpartition(".")[2] in {"profile", "gpu"}]
NONE = np.zeros(0, np.float32)
CURVES = Curves(NONE, NONE, NONE.astype(np.int64), NONE, NONE, NONE, NONE, 21, 42)


def ask(name: str, times: Times | None, recipe: Recipe = RECIPE, **thresholds: float) -> Finding:
    """Return a rule's answer with the thresholds of the configuration, and check that its remedy is one."""
    recording = Recording(flatten(to_plain(recipe)), CURVES, times=times)
    finding = RULES[name](recording, **CONFIG.diagnosis.rules[name].thresholds | thresholds)
    assert finding.rule == name
    if finding.remedy:
        assert patch(recipe, finding.remedy) != recipe
    return finding


def made_up(steps: int = 400, seconds: float = 0.1, samples: int = 60, **fields) -> Times:
    """Return times of a healthy training with some fields replaced."""
    random = np.random.default_rng(0)
    step = (seconds * random.uniform(0.9, 1.1, steps)).astype(np.float32)
    total = float(step.sum()) + 3
    sampled = np.arange(1, steps + 1, 4)
    part = step[sampled - 1]
    values = {
        "first_step": 1,
        "step": step,
        "wait": 0.02 * step,
        "sampled": sampled,
        "data": 0.02 * part,
        "forward": 0.4 * part,
        "backward": 0.5 * part,
        "optimiser": 0.06 * part,
        "rest": 0.02 * part,
        "initialisation": 1.0,
        "training": float(step.sum()),
        "validation": 1.5,
        "logging": 0.5,
        "total": total,
        "samples": 64 * steps,
        "system_at": np.linspace(0.1, total, samples),
        "cpu": np.full(samples, 95.0),
        "machine_cpu": np.full(samples, 97.0),
        "memory": 5e8 + 1e6 * random.standard_normal(samples),
        "disk_read": np.zeros(samples),
        "disk_write": np.zeros(samples),
        "gpu": np.full(samples, np.nan),
        "gpu_memory": np.full(samples, np.nan),
        "cores": 8,
        "threads": 8,
        "device": "cpu",
        "precision": "32-true",
        "resident": True,
        "loader_workers": 0,
    }
    return Times(**values | fields)


def on_gpu(busy: float, samples: int = 60, **fields) -> Times:
    values = {
        "device": "cuda",
        "gpu": np.full(samples, busy),
        "gpu_memory": np.full(samples, 2e9),
        "cpu": np.full(samples, 13.0),
        "gpu_memory_total": 24e9,
        "gpu_memory_base": 1e9,
        "gpu_memory_peak": 2e9,
    }
    return made_up(samples=samples, **values | fields)


class Disturb(Callback):
    """Does something inside each step."""

    def __init__(self, act):
        self.act = act

    def on_before_backward(self, trainer, pl_module, loss):
        self.act(trainer.global_step + 1)


def timed_fit(packed, folder: Path, overrides: list[str], act=lambda step: None) -> tuple[Recipe, Times]:
    """Return the times of a real fit whose system is sampled."""
    recipe, stopwatch = recipe_with(overrides), Stopwatch()
    writer = spools.Writer(folder / "spool", "run")
    writer.append("start", system_metrics_every_s=0.2, **spools.writer_identity())
    with sampling(folder / "spool"):
        fit(recipe, packed, state_folder=folder, callbacks=[stopwatch, Disturb(act)])
    return recipe, stopwatch.times(read_samples(system_file(folder / "spool", "run")))


@pytest.mark.parametrize("name", NAMES)
def test_a_healthy_training_fires_no_rule(name):
    finding = ask(name, made_up())
    assert finding.status == ("not evaluated" if "gpu" in RULES[name].__module__ else "ok")
    assert finding.explanation
    assert ask(name, on_gpu(97.0, gpu_memory_peak=20e9)).status == "ok"


@pytest.mark.parametrize("name", NAMES)
def test_too_little_is_not_evaluated(name):
    assert ask(name, None).status == "not evaluated"
    assert ask(name, made_up(steps=10, samples=3)).status == "not evaluated"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        ([], {}),
        (["trainer.data_on_device=no", "trainer.workers=0"], {"trainer.data_on_device": "auto"}),
    ],
    ids=["resident", "through the map"],
)
def test_slow_data_fire_slow_loader(packed, tmp_path, monkeypatch, overrides, remedy):
    original = batches.augment

    def slow(*arguments):
        time.sleep(0.05)
        return original(*arguments)

    monkeypatch.setattr(batches, "augment", slow)
    recipe, times = timed_fit(packed, tmp_path, overrides)
    finding = ask("slow_loader", times, recipe)
    assert finding.status == "fired"
    assert finding.evidence["wait_seconds"] > 0.05 * len(times.step) * 0.99
    assert finding.remedy == remedy
    assert finding.first_step is not None


def test_more_workers_than_cores_fire_slow_loader():
    finding = ask("slow_loader", made_up(resident=False, loader_workers=9))
    assert finding.status == "fired"
    assert finding.remedy == {"trainer.workers": 7}


@pytest.mark.slow
def test_a_leak_fires_memory_growth_and_the_same_fit_without_it_does_not(packed, tmp_path):
    held: list[np.ndarray] = []

    def leak(step):
        held.append(np.ones(4_000_000))
        time.sleep(0.06)

    recipe, times = timed_fit(packed, tmp_path / "sick", [], leak)
    finding = ask("memory_growth", times, recipe, samples=8)
    assert finding.status == "fired", finding
    low, high = finding.evidence["interval"]
    assert 0 < low <= finding.evidence["mb_per_minute"] <= high
    held.clear()
    recipe, times = timed_fit(packed, tmp_path / "healthy", [], lambda step: time.sleep(0.06))
    assert ask("memory_growth", times, recipe, samples=8).status == "ok"


@given(
    shape=st.sampled_from(["flat", "fills and levels off", "fills slowly", "fragments", "steps up once", "falls"]),
    noise=st.floats(0, 2e7),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_memory_that_does_not_keep_growing_is_no_leak(shape, noise, seed):
    at = np.linspace(0, 1, 120)
    grown = {
        "flat": 0 * at,
        "fills and levels off": 4e8 * (1 - np.exp(-10 * at)),
        "fills slowly": 2e9 * (1 - np.exp(-5 * at)),
        "fragments": 2.5e8 * at,  # as measured: an allocator's blocks in the first 400 steps
        "steps up once": 4e8 * (at > 0.4),
        "falls": -2e8 * at,
    }[shape]
    memory = 8e8 + grown + noise * np.random.default_rng(seed).standard_normal(120)
    assert ask("memory_growth", made_up(samples=120, memory=memory)).status == "ok"


@given(slope=st.floats(7e8, 5e9), noise=st.floats(0, 1e7))
@settings(max_examples=30)
def test_memory_that_keeps_growing_is_one(slope, noise):
    random = np.random.default_rng(0)
    memory = 5e8 + slope * np.linspace(0, 1, 120) + noise * random.standard_normal(120)
    finding = ask("memory_growth", made_up(samples=120, memory=memory))
    assert finding.status == "fired"
    truth = 60 * slope / 1e6 / made_up().total
    assert finding.evidence["mb_per_minute"] == pytest.approx(truth, rel=0.2)


@pytest.mark.slow
def test_a_planted_slow_step_of_a_real_fit_is_named(packed, tmp_path):
    recipe, times = timed_fit(packed, tmp_path, [], lambda step: time.sleep(4 if step == 30 else 0))
    finding = ask("step_outliers", times, recipe)
    assert finding.status == "fired"
    assert finding.evidence["worst_steps"][0] == 30
    assert finding.evidence["lost_seconds"] > 3


@given(planted=st.sets(st.integers(6, 399), min_size=1, max_size=40), first=st.integers(1, 10_000))
@settings(max_examples=30)
def test_all_planted_slow_steps_are_counted(planted, first):
    healthy = made_up()
    step = healthy.step.copy()
    step[[number - 1 for number in planted]] = 8.0
    times = replace(
        healthy, first_step=first, sampled=healthy.sampled + first - 1, step=step, training=float(step.sum())
    )
    finding = ask("step_outliers", times)
    assert finding.status == "fired"
    assert finding.evidence["slow_steps"] == len(planted)
    assert finding.first_step == first - 1 + min(planted)
    assert {number - first + 1 for number in finding.evidence["worst_steps"]} <= planted


def test_a_busy_machine_gets_fewer_threads():
    step = made_up().step.copy()
    step[100:130] = 2.0
    times = made_up(step=step, cpu=np.full(60, 40.0), machine_cpu=np.full(60, 99.0))
    assert ask("step_outliers", times).remedy == {"trainer.threads": 4}
    assert ask("step_outliers", replace(times, machine_cpu=np.full(60, 42.0))).remedy == {}


@pytest.mark.parametrize(("read", "wait", "status"), [(30e6, 0.5, "fired"), (0.0, 0.5, "ok"), (30e6, 0.01, "ok")])
def test_io_bottleneck_needs_a_wait_and_reading(read, wait, status):
    healthy = made_up()
    waited = wait * healthy.step
    waited[:3] = 0
    times = replace(healthy, resident=False, loader_workers=2, wait=waited, disk_read=np.full(60, read))
    finding = ask("io_bottleneck", times)
    assert finding.status == status
    assert ask("io_bottleneck", replace(times, resident=True)).status == "ok"
    if status == "fired":
        assert finding.first_step == times.first_step + 3
        assert finding.remedy == {"trainer.workers": 4}
        assert ask("io_bottleneck", times, patch(RECIPE, {"trainer.data_on_device": "no"})).remedy == {
            "trainer.data_on_device": "auto"
        }


@pytest.mark.parametrize(("seconds", "status"), [(5.0, "ok"), (30.0, "fired")])
def test_a_long_initialisation_counts_where_it_lasts(seconds, status):
    healthy = made_up(steps=40)
    times = replace(healthy, initialisation=seconds, total=healthy.training + 2 + seconds)
    assert ask("long_initialisation", times).status == status


def test_a_slow_first_step_is_initialisation_and_compiling_is_named():
    step = made_up(steps=40).step.copy()
    step[0] = 40.0
    times = made_up(steps=40, step=step, training=float(step.sum()), total=float(step.sum()) + 3)
    finding = ask("long_initialisation", times, patch(RECIPE, {"trainer.compile": True}))
    assert finding.remedy == {"trainer.compile": False}


def test_an_idle_gpu_fires_and_the_cause_is_told():
    idle = on_gpu(20.0)
    assert ask("low_gpu_utilisation", idle).remedy == {"trainer.compile": True}
    assert ask("cpu_bottleneck", idle).status == "fired"
    assert ask("cpu_bottleneck", replace(idle, cpu=np.full(60, 2.0))).status == "ok"
    starved = replace(idle, resident=False, loader_workers=2, wait=0.6 * idle.step,
                      forward=0.1 * idle.forward, backward=0.1 * idle.backward)  # fmt: skip
    assert ask("low_gpu_utilisation", starved).remedy == {"trainer.workers": 4}


def test_a_small_batch_is_told_with_the_largest_that_fits():
    finding = ask("small_batch", on_gpu(40.0))
    assert finding.status == "fired"
    # 64 images take 1 GB beside 1 GB; of 24 GB a tenth is left alone.
    assert finding.evidence["largest_that_fits"] == int(64 * 20.6)
    assert finding.remedy == {"trainer.batch_size": 256}
    assert ask("small_batch", on_gpu(40.0, gpu_memory_peak=0.0)).status == "not evaluated"
    assert ask("small_batch", on_gpu(40.0, gpu_memory_peak=18e9)).status == "ok"


def test_on_a_gpu_a_wait_that_it_worked_through_is_none():
    hidden = on_gpu(97.0, wait=0.5 * made_up().step)
    assert hidden.split()["data"] == pytest.approx(0.02 * hidden.training, rel=0.2)
    assert sum(hidden.split().values()) == pytest.approx(hidden.total, rel=1e-3)
