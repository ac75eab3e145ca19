"""System metrics of a run's process and machine, sampled by the deliverer: the run itself pays nothing.

The names are MLflow's own (`system/cpu_utilization_percentage`, `system/gpu_0_memory_usage_megabytes`, …), so
its page of system metrics shows them; `system/process_…` are of the run's process with its children.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil


class Sampler:
    """Appends a sample to the run's system file whenever one is due."""

    def __init__(self, path: Path, pid: int, every_s: float, began_at: float) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.path, self.pid, self.every_s, self.began_at = path, pid, every_s, began_at
        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_gpu_monitors()]
        self.processes: dict[int, psutil.Process] = {}
        self.last = 0.0
        self.step = 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def sample_if_due(self) -> None:
        """Write one sample; after ten minutes they get rarer with the run's age, so a long run stays small."""
        now = time.time()
        if now - self.last < max(self.every_s, (now - self.began_at) / 600):
            return
        self.last = now
        values = self._process()
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        event = {"event": "metrics", "at": round(now * 1000), "step": self.step, "values": values}
        self.step += 1
        with self.path.open("a") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")

    def _process(self) -> dict[str, float]:
        cpu = memory = 0.0
        try:
            parent = self.processes.setdefault(self.pid, psutil.Process(self.pid))
            for child in parent.children(recursive=True):
                self.processes.setdefault(child.pid, child)
            for process in list(self.processes.values()):
                try:
                    cpu += process.cpu_percent()  # since the last sample of the same object
                    memory += process.memory_info().rss
                except psutil.NoSuchProcess:
                    del self.processes[process.pid]
        except psutil.Error:
            return {}
        return {
            "system/process_cpu_utilization_percentage": round(cpu, 1),
            "system/process_memory_usage_megabytes": round(memory / 1e6, 1),
        }


def _gpu_monitors() -> list:
    try:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        return [GPUMonitor()]
    except Exception:  # no package, no driver, no GPU
        return []
