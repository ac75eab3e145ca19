"""The stopwatch and the tracer on real fits: the parts add up, nothing is changed, nothing breaks them."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from training_recipes import SignalAt, recipe_with, same

from cnn_tuning.diagnosis.recording import Times, read_part, write_part
from cnn_tuning.diagnosis.stopwatch import PHASES, Stopwatch, _system
from cnn_tuning.diagnosis.trace import Tracer
from cnn_tuning.machine import usable_cores
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted

STEPS = 42  # of two epochs of the digits at batch 64


@pytest.fixture(scope="module")
def timed(packed, tmp_path_factory):
    """Return a fit, a fit that was watched, its times, and the tracer that took part."""
    folder, recipe = tmp_path_factory.mktemp("timed"), recipe_with([])
    plain = fit(recipe, packed, state_folder=folder / "plain")
    stopwatch, tracer = Stopwatch(), Tracer(folder)
    watched = fit(recipe, packed, state_folder=folder / "watched", callbacks=[stopwatch, tracer])
    return plain, watched, stopwatch.times(), tracer


def test_a_watched_fit_gives_the_same_weights(timed):
    plain, watched, *_ = timed
    assert same(plain.network, watched.network)
    assert plain.history == watched.history


def test_parts_add_up(timed):
    _, _, times, _ = timed
    assert len(times.step) == len(times.wait) == STEPS
    assert 64 * (STEPS - 2) < times.samples <= 64 * STEPS
    assert sum(getattr(times, phase) for phase in PHASES) == pytest.approx(times.total)
    assert times.step.sum() == pytest.approx(times.training, rel=1e-4)
    assert (times.wait <= times.step).all()
    inside = times.data + times.forward + times.backward + times.optimiser + times.rest
    np.testing.assert_allclose(inside, times.step[times.sampled - 1], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(times.data, times.wait[times.sampled - 1], rtol=1e-3, atol=1e-6)
    split = times.split()
    assert sum(split.values()) == pytest.approx(times.total, rel=1e-4)
    assert all(seconds >= 0 for seconds in split.values())
    assert (times.device, times.resident, times.loader_workers) == ("cpu", True, 0)


def test_times_survive_a_file(timed, tmp_path):
    _, _, times, _ = timed
    write_part(tmp_path / "times.npz", times)
    back = read_part(tmp_path / "times.npz", Times)
    for field in fields(Times):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(times, field.name))


def test_the_trace_has_the_parts_of_each_step(timed):
    *_, tracer = timed
    with gzip.open(tracer.folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    for part in ("forward", "backward", "optimiser"):
        assert names.count(part) == tracer.active
    assert "aten::convolution" in names
    assert [path.name for path in tracer.folder.glob("trace*")] == ["trace.json.gz"]


def test_operators_are_ranked_by_their_share(timed):
    *_, tracer = timed
    shares = [operator.share for operator in tracer.operators]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    by_name = {operator.name: operator for operator in tracer.operators}
    assert not {"forward", "backward", "optimiser"} & set(by_name)
    convolution = by_name["aten::convolution"]
    assert convolution.calls % tracer.active == 0
    assert convolution.cpu_s > convolution.self_cpu_s > 0
    with (tracer.folder / "operators.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [one.name for one in tracer.operators]


class _CountClock:
    """Counts how often the module under test reads the clock."""

    def __init__(self, clock):
        self.clock, self.count = clock, 0

    def __call__(self):
        self.count += 1
        return self.clock()


def test_a_step_costs_three_readings_of_the_clock(packed, tmp_path, monkeypatch):
    import cnn_tuning.diagnosis.stopwatch as module

    class Time:
        perf_counter = _CountClock(module.time.perf_counter)
        time = module.time.time

    monkeypatch.setattr(module, "time", Time)
    stopwatch = Stopwatch()
    fit(recipe_with(["trainer.batch_size=8", "trainer.max_epochs=1"]), packed, state_folder=tmp_path,
        callbacks=[stopwatch])  # fmt: skip
    times = stopwatch.times()
    assert len(times.step) > 150
    assert 50 <= len(times.sampled) < len(times.step)
    # Five hooks inside a sampled step, and a few readings a fit.
    assert Time.perf_counter.count <= 3 * len(times.step) + 6 * len(times.sampled) + 10


def test_of_a_resumed_fit_it_covers_the_part_of_this_process(packed, tmp_path):
    recipe, first, second = recipe_with([]), Stopwatch(), Stopwatch()
    with pytest.raises(Interrupted):
        fit(recipe, packed, state_folder=tmp_path, callbacks=[first, SignalAt(10)])
    interrupted = first.times()
    assert interrupted.first_step == 1
    assert len(interrupted.step) == 10
    assert sum(getattr(interrupted, phase) for phase in PHASES) == pytest.approx(interrupted.total)
    fit(recipe, packed, state_folder=tmp_path, callbacks=[second])
    resumed = second.times()
    assert resumed.first_step == 11
    assert len(resumed.step) == STEPS - 10
    assert resumed.sampled[0] == 11
    assert sum(resumed.split().values()) == pytest.approx(resumed.total, rel=1e-4)


def test_a_fit_that_starts_anew_is_timed_anew(packed, tmp_path):
    class Full(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if len(batch[1]) == 64 and batch_idx == 5:
                raise torch.OutOfMemoryError("out of memory")

    stopwatch = Stopwatch()
    recipe = recipe_with(["trainer.on_out_of_memory=halve_batch", "trainer.max_epochs=1"])
    fit(recipe, packed, state_folder=tmp_path, callbacks=[stopwatch, Full()])
    times = stopwatch.times()
    assert len(times.step) == -(-times.samples // 32)
    assert sum(getattr(times, phase) for phase in PHASES) == pytest.approx(times.total)


def test_of_several_gpus_it_is_the_one_that_trains():
    """Names are the machine's numbers, in CUDA's order: CUDA_VISIBLE_DEVICES=3,1."""
    used = {f"system/gpu_{n}_utilization_percentage": 10.0 * n for n in (3, 1)}
    held = {f"system/gpu_{n}_memory_usage_megabytes": float(n) for n in (3, 1)}
    for device, number in ((0, 3), (1, 1)):
        columns = _system([(5.0, {**used, **held})], 0.0, 10.0, device)
        assert (columns["gpu"][0], columns["gpu_memory"][0]) == (10 * number, 1e6 * number)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_memory_of_an_earlier_training_is_not_this_ones(packed, tmp_path):
    recipe, before = recipe_with(["trainer.max_epochs=1", "trainer.accelerator=gpu"]), 1 << 30
    del (large := [torch.empty(before, dtype=torch.uint8, device="cuda")])[0]
    stopwatch = Stopwatch()
    fit(recipe, packed, state_folder=tmp_path, callbacks=[stopwatch])
    assert not large and 0 < stopwatch.times().gpu_memory_peak < before


def test_samples_of_the_system_are_those_of_its_time():
    stopwatch = Stopwatch()
    system = {
        "system/process_cpu_utilization_percentage": 100.0 * usable_cores(),
        "system/process_memory_usage_megabytes": 5.0,
        "system/gpu_1_memory_usage_megabytes": 7.0,
        "system/gpu_1_utilization_percentage": 40.0,
    }
    at = stopwatch.began_at
    times = stopwatch.times([(at - 9, system), (at, system), (at + 1e-9, {}), (at + 1e4, system)])
    assert len(times.system_at) >= 1
    assert (times.cpu[0], times.memory[0], times.gpu[0], times.gpu_memory[0]) == (100, 5e6, 40, 7e6)
    assert np.isnan([times.disk_read[0], times.machine_cpu[0]]).all()
    assert (times.system_at >= 0).all()
    assert (times.system_at <= times.total).all()
    assert len(times.step) == 0
    assert sum(times.split().values()) == pytest.approx(times.total)
