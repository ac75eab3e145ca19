"""System metrics of the runs of a spool folder, sampled by a thread of the deliverer: a run itself pays nothing.

In come the processes that write the spool, out goes `DIR/KEY/system.jsonl`; no tracking server is needed. The
names are MLflow's own (`system/cpu_utilization_percentage`, `system/gpu_0_memory_usage_megabytes`, …), so its
page of system metrics shows them; `system/process_…` are of the run's process with its children.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from cnn_tuning.tracking import spool as spools

FILE = "system.jsonl"
LOOK_EVERY_S = 0.1
QUICKEST_S = 0.2
Sample = tuple[float, dict[str, float]]


def system_file(spool: Path, key: str) -> Path:
    """Return where a run's samples are."""
    return spool / key / FILE


def read_samples(path: Path) -> list[Sample]:
    """Return (seconds since the epoch, metric name → value) of each sample; none where there is no file."""
    events = (event for event, _ in spools.read(path, 0))
    return [(event["at"] / 1000, event["values"]) for event in events if event["event"] == "metrics"]


@contextlib.contextmanager
def sampling(spool: Path) -> Iterator[None]:
    """Sample all living runs of a spool folder, also those that begin meanwhile, until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=_sample_folder, args=(spool, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def interval(age_s: float, every_s: float) -> float:
    """Return the pause before the next sample: short at first, long after ten minutes, to keep files small."""
    return max(min(every_s, max(QUICKEST_S, age_s / 50)), age_s / 600)


class Sampler:
    """Appends a sample to one run's system file whenever one is due."""

    def __init__(self, path: Path, start: dict[str, Any]) -> None:
        self.path, self.pid, self.every_s = path, start["pid"], float(start["system_metrics_every_s"])
        self.began_at = start["at"] / 1000
        self.processes: dict[int, psutil.Process] = {}
        self.read_written: dict[int, tuple[int, int]] = {}
        self.network = _network()
        self.last = time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.step = sum(1 for _ in spools.read(path, 0))  # another deliverer may have begun the file
        self._process(1.0)  # shares of time are since the call before
        psutil.cpu_percent()

    def sample_if_due(self) -> None:
        """Write one sample if the last one is long enough ago."""
        now = time.time()
        past = now - self.last
        if past < interval(now - self.began_at, self.every_s):
            return
        self.last = now
        values = {**self._process(past), **self._machine(), **_gpus()}
        named = {f"system/{name}": round(value, 3) for name, value in values.items()}
        event = {"event": "metrics", "at": round(now * 1000), "step": self.step, "values": named}
        self.step += 1
        with self.path.open("a") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")

    def _process(self, past: float) -> dict[str, float]:
        cpu = memory = read = written = 0.0
        try:
            parent = self.processes.setdefault(self.pid, psutil.Process(self.pid))
            for child in parent.children(recursive=True):
                if child.pid != os.getpid():  # the deliverer is the run's child and no part of its work
                    self.processes.setdefault(child.pid, child)
        except psutil.Error:
            return {}
        for process in list(self.processes.values()):
            try:
                cpu += process.cpu_percent()
                memory += _private_bytes(process)
                before = self.read_written.get(process.pid, (0, 0))
                self.read_written[process.pid] = now = _disk_bytes(process)
            except psutil.Error:
                del self.processes[process.pid]
                self.read_written.pop(process.pid, None)
                continue
            read, written = read + now[0] - before[0], written + now[1] - before[1]
        return {
            "process_cpu_utilization_percentage": cpu,
            "process_memory_usage_megabytes": memory / 1e6,
            "process_disk_read_megabytes_per_second": read / past / 1e6,
            "process_disk_write_megabytes_per_second": written / past / 1e6,
        }

    def _machine(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        received, sent = _network()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (received - self.network[0]) / 1e6,
            "network_transmit_megabytes": (sent - self.network[1]) / 1e6,
        }


def _sample_folder(spool: Path, stop: threading.Event) -> None:
    samplers: dict[str, Sampler | None] = {}  # None: over, or of another machine
    while not stop.wait(LOOK_EVERY_S):
        for key in spools.keys(spool):
            # A full disk or a removed folder costs samples, not the delivery.
            with contextlib.suppress(OSError, psutil.Error):
                if key not in samplers:
                    if spools.opening_of(spool, key) is None:
                        continue
                    samplers[key] = None if spools.is_ending(spool, key) else _sampler(spool, key)
                sampler = samplers[key]
                if sampler is None:
                    continue
                sampler.sample_if_due()
                if spools.is_ending(spool, key) or not psutil.pid_exists(sampler.pid):
                    samplers[key] = None


def _sampler(spool: Path, key: str) -> Sampler | None:
    start = spools.start_of(spool, key)
    if start is None:
        return None
    here = start["host"] == spools.platform.node()
    if not here or not spools.writer_alive(start, start["at"]):
        return None
    return Sampler(system_file(spool, key), start)


def _private_bytes(process: psutil.Process) -> float:
    """Return a process's memory without what it maps or shares: reading a mapped file is no growth."""
    info = process.memory_info()
    return info.rss - getattr(info, "shared", 0)


def _disk_bytes(process: psutil.Process) -> tuple[int, int]:
    if not hasattr(process, "io_counters"):  # macOS
        return 0, 0
    counters = process.io_counters()
    return counters.read_bytes, counters.write_bytes


def _network() -> tuple[int, int]:
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


def _gpus() -> dict[str, float]:
    """Return the figures of the GPUs that the run may use."""
    values: dict[str, float] = {}
    for number, handle in _gpu_handles():
        nvml = sys.modules["pynvml"]
        with contextlib.suppress(nvml.NVMLError):
            memory, name = nvml.nvmlDeviceGetMemoryInfo(handle), f"gpu_{number}"
            values[f"{name}_memory_usage_megabytes"] = memory.used / 1e6
            values[f"{name}_memory_usage_percentage"] = 100 * memory.used / memory.total
            values[f"{name}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            values[f"{name}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return values


_handles: list[tuple[int, Any]] | None = None


def _gpu_handles() -> list[tuple[int, Any]]:
    global _handles
    if _handles is None:
        try:
            import pynvml

            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            listed = [part.strip() for part in visible.split(",")] if visible else list(map(str, range(count)))
            numbers = [int(part) for part in listed] if all(map(str.isdigit, listed)) else range(count)
            _handles = [(number, pynvml.nvmlDeviceGetHandleByIndex(number)) for number in numbers]
        except Exception:  # no package, no driver, no GPU
            _handles = []
    return _handles
