"""Rules on how a GPU was used: `Times` in, findings out. Without one they are not evaluated."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Recording, Times

FEWEST_SAMPLES = 10
# Of the GPU's memory, left for what an estimate does not see.
RESERVE = 0.1


def low_gpu_utilisation(recording: Recording, *, percent: float) -> Finding:
    """The GPU is idle for much of the training."""
    rule, times = "low_gpu_utilisation", recording.times
    reason = _unknown(times)
    if times is None or reason:
        return not_evaluated(rule, reason)
    busy = float(np.median(_while_training(times, times.gpu)))
    evidence = {"median_percent": busy, "data_share": _data_share(times)}
    if busy >= percent:
        return ok(rule, f"the GPU was busy {busy:.0f} % of the time", evidence)
    advice, remedy = _busier(recording, times)
    return fired(
        rule,
        f"the GPU was busy only {busy:.0f} % of the time (median)",
        evidence=evidence,
        advice=advice,
        remedy=remedy,
    )


def cpu_bottleneck(recording: Recording, *, gpu_percent: float, cpu_cores: float, share: float) -> Finding:
    """The GPU waits while a core of the processor is fully busy: launching work takes longer than the work."""
    rule, times = "cpu_bottleneck", recording.times
    reason = _unknown(times)
    if times is None or reason:
        return not_evaluated(rule, reason)
    gpu, cores = _while_training(times, times.gpu, times.cpu * times.cores / 100)
    waits = float(((gpu < gpu_percent) & (cores >= cpu_cores)).mean())
    evidence = {"share_of_samples": waits, "median_gpu_percent": float(np.median(gpu)),
                "median_busy_cores": float(np.median(cores))}  # fmt: skip
    seen = f"in {waits:.0%} of the samples the GPU was idle for lack of work while the processor was busy"
    if waits <= share:
        return ok(rule, seen, evidence)
    advice, remedy = _busier(recording, times)
    return fired(rule, seen, evidence=evidence, advice=advice, remedy=remedy)


def small_batch(recording: Recording, *, gpu_percent: float, memory_share: float, times_larger: float) -> Finding:
    """The batch is too small to fill the GPU, which has the memory for a larger one.

    The largest that fits follows from the memory between steps and at their peak, which grows with the batch.
    """
    rule, times = "small_batch", recording.times
    reason = _unknown(times)
    if times is None or reason:
        return not_evaluated(rule, reason)
    batch, per_batch = int(recording.recipe["trainer.batch_size"]), times.gpu_memory_peak - times.gpu_memory_base
    if times.gpu_memory_base <= 0 or per_batch <= 0:
        return not_evaluated(rule, "the GPU's memory was not measured between and inside steps")
    busy = float(np.median(_while_training(times, times.gpu)))
    used = times.gpu_memory_peak / times.gpu_memory_total
    room = (1 - RESERVE) * times.gpu_memory_total - times.gpu_memory_base
    fits = int(batch * room / per_batch)
    evidence = {"batch_size": batch, "largest_that_fits": fits, "memory_share": used, "median_gpu_percent": busy}
    seen = f"at batch size {batch} the GPU was busy {busy:.0f} % of the time, with {used:.0%} of its memory"
    larger = 1 << (min(fits, int(batch * times_larger)).bit_length() - 1) if fits > 0 else 0
    if busy >= gpu_percent or used >= memory_share or larger <= batch:
        return ok(rule, seen, evidence)
    return fired(
        rule,
        f"{seen}; about {fits:,} images would fit",
        evidence=evidence,
        advice="a larger batch fills it; fewer updates an epoch may want a higher learning rate",
        remedy={"trainer.batch_size": larger},
    )


def _unknown(times: Times | None) -> str:
    """Return why nothing can be said of a GPU, or nothing if something can."""
    if times is None:
        return "no times were recorded"
    if times.device == "cpu":
        return "no GPU took part: it trained on the CPU"
    sampled = len(_while_training(times, times.gpu))
    few = f"the GPU was sampled {sampled} times while it trained; {FEWEST_SAMPLES} are needed"
    return few if sampled < FEWEST_SAMPLES else ""


def _while_training(times: Times, *columns: NDArray[Any]) -> NDArray[Any]:
    """Return the samples after initialisation in which all of these are known: one row a column, or one alone."""
    known = np.isfinite(np.stack(columns)).all(0) & (times.system_at > times.initialisation)
    chosen = np.stack(columns)[:, known]
    return chosen[0] if len(columns) == 1 else chosen


def _data_share(times: Times) -> float:
    return times.split()["data"] / max(times.training, 1e-9)


def _busier(recording: Recording, times: Times) -> tuple[str, dict[str, Any]]:
    """Return advice and patch that give the GPU more to do in the same time."""
    recipe = recording.recipe
    if _data_share(times) > 0.2 and not times.resident:
        if recipe["trainer.data_on_device"] == "no":
            return "it waits for data: keep the images on the GPU", {"trainer.data_on_device": "auto"}
        workers = min(times.cores, 2 * times.loader_workers or 2)
        if workers <= times.loader_workers:
            return "it waits for data, which all cores read already: store smaller images, or augment less", {}
        return "it waits for data: read with more workers", {"trainer.workers": workers}
    if not recipe["trainer.compile"]:
        return "launch fewer, larger kernels", {"trainer.compile": True}
    return "give it larger batches", {"trainer.batch_size": 2 * int(recipe["trainer.batch_size"])}
