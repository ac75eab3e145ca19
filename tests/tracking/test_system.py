"""Sampling of a run's process: quick at first, without a tracking server, and of its private memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.tracking import spool as spools
from cnn_tuning.tracking.system import Sampler, interval, read_samples, sampling, system_file

MEMORY = "system/process_memory_usage_megabytes"


def _start(every_s: float) -> dict:
    return {"at": time.time() * 1000, "system_metrics_every_s": every_s, **spools.writer_identity()}


# A process of its own: what this one has in memory and as children depends on the tests before.
ALONE = """
import json, sys, time
import psutil
from cnn_tuning.config import TrackingConfig
from cnn_tuning.tracking.run import Run

away = TrackingConfig("test", "tests", uri="http://127.0.0.1:9", spool=sys.argv[1], wait_s=0.1)
with Run.start(away, name="away", kind="train", params={}) as run:
    while len(samples := run.system_samples()) < 4:
        time.sleep(0.1)
    own = psutil.Process().memory_info()
print(json.dumps([samples, (own.rss - own.shared) / 1e6]))
"""


def test_a_run_is_sampled_while_its_server_is_away(tmp_path):
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples, own = json.loads(done.stdout)
    with FileLock(tmp_path / spools.LOCK, timeout=60):  # the deliverer has left
        pass
    values = samples[-1][1]
    assert values[MEMORY] == pytest.approx(own, abs=20)  # not the deliverer's, too
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    assert values["system/process_disk_read_megabytes_per_second"] >= 0
    at = [moment for moment, _ in samples]
    assert at == sorted(at)


ANOTHER = """
import sys
import numpy as np
for line in sys.stdin:
    if line == "map\\n":
        assert np.load(sys.argv[1], mmap_mode="r").sum() == 8_000_000
    elif line == "hold\\n":
        held = np.ones(8_000_000)
    print("done", flush=True)
"""


def test_memory_is_the_runs_own_and_reading_a_mapped_file_adds_none(tmp_path):
    np.save(tmp_path / "mapped.npy", np.ones(8_000_000))
    command = [sys.executable, "-c", ANOTHER, str(tmp_path / "mapped.npy")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as other:
        sampler = Sampler(tmp_path / "system.jsonl", _start(1e-9) | {"pid": other.pid})

        def after(order: str) -> float:
            other.stdin.write(order + "\n")
            assert other.stdout.readline() == "done\n"
            time.sleep(0.21)
            sampler.sample_if_due()
            return read_samples(sampler.path)[-1][1][MEMORY]

        before = after("nothing")
        assert after("map") < before + 32
        assert after("hold") > before + 48
        other.stdin.close()


def test_each_run_of_a_folder_is_sampled_until_its_end(tmp_path):
    first, second = spools.Writer(tmp_path, "first"), spools.Writer(tmp_path, "second")
    with sampling(tmp_path):
        for writer in (first, second):
            writer.append("start", **{k: v for k, v in _start(0.2).items() if k != "at"})
        while any(len(read_samples(system_file(tmp_path, key))) < 2 for key in ("first", "second")):
            time.sleep(0.05)
        first.append("finish", status="FINISHED")
        time.sleep(0.5)
        ended = len(read_samples(system_file(tmp_path, "first")))
        more = len(read_samples(system_file(tmp_path, "second")))
        while len(read_samples(system_file(tmp_path, "second"))) < more + 2:
            time.sleep(0.05)
        assert len(read_samples(system_file(tmp_path, "first"))) <= ended + 1
    assert os.getpid() == spools.start_of(tmp_path, "first")["pid"]


@given(st.floats(0, 1e6), st.floats(0.01, 60))
def test_samples_are_dense_at_first_and_never_too_many(age, every):
    pause = interval(age, every)
    assert pause > 0
    assert pause <= max(every, 0.2, age / 600)
    assert interval(age + 1, every) >= pause
    assert interval(1, every) <= 0.2
