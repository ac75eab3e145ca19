"""Rules on where the time and the memory went: `Times` in, findings out; those of a GPU are in `gpu`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Recording, Times

# Fewer steps than this say nothing of a training.
FEWEST_STEPS = 20
# The first steps build what later ones use: kernels, buffers, compiled code.
WARMUP_STEPS = 5
WORST_SHOWN = 8
# Percent of the processor: from here on other processes slow a training down.
MUCH_OTHER_USE = 25
# A normal distribution's standard deviation over its median absolute deviation.
SIGMA_PER_MAD = 1.4826


def slow_loader(recording: Recording, *, wait_share: float, seconds: float) -> Finding:
    """The steps wait for their data, or more processes read data than there are cores.

    The wait counts as a share of the steps' own time, and only where it adds up to something.
    """
    times, rule = recording.times, "slow_loader"
    if times is None or len(times.step) < FEWEST_STEPS:
        return _too_few(rule, times)
    wait, share = _wait(times)
    workers = times.loader_workers
    evidence = {"wait_seconds": wait, "wait_share": share, "workers": workers, "cores": times.cores}
    if workers > times.cores:
        return fired(
            rule,
            f"{workers} processes read data on {times.cores} cores: they take turns with the training",
            evidence=evidence,
            advice="no more workers than cores",
            remedy={"trainer.workers": max(1, times.cores - 1)},
        )
    if share <= wait_share or wait <= seconds:
        return ok(rule, f"{share:.1%} of the steps' time was waiting for data", evidence)
    advice, remedy = _faster_data(recording, times)
    longest = int(times.wait.argmax())
    return fired(
        rule,
        f"{share:.0%} of the steps' time ({wait:.1f} s) was waiting for data",
        evidence={**evidence, "longest_wait_seconds": float(times.wait[longest])},
        advice=advice,
        remedy=remedy,
        first_step=_first(times, times.wait > wait_share * times.step),
    )


def io_bottleneck(recording: Recording, *, wait_share: float, read_mb_per_s: float) -> Finding:
    """The steps wait for data while the disk is read: it is storage that they wait for, not the processor."""
    times, rule = recording.times, "io_bottleneck"
    if times is None or len(times.step) < FEWEST_STEPS:
        return _too_few(rule, times)
    if times.resident:
        return ok(rule, "the images are on the device: no file is read between steps")
    while_training = times.disk_read[times.system_at > times.initialisation]
    if np.isfinite(while_training).sum() < 5:
        return not_evaluated(rule, "reading from disk was sampled fewer than 5 times while it trained")
    read = float(np.nanmean(while_training)) / 1e6
    wait, share = _wait(times)
    evidence = {"wait_share": share, "wait_seconds": wait, "read_mb_per_s": read}
    seen = f"{share:.1%} of the steps' time was waiting for data, {read:.1f} MB/s came from disk"
    if share <= wait_share or read <= read_mb_per_s:
        return ok(rule, seen, evidence)
    advice, remedy = _faster_data(recording, times)
    return fired(
        rule,
        seen,
        evidence=evidence,
        advice=f"{advice}; or read from a faster disk",
        remedy=remedy,
        first_step=_first(times, times.wait > wait_share * times.step),
    )


def memory_growth(recording: Recording, *, share: float, megabytes: float, samples: float) -> Finding:
    """The process's memory keeps growing: something holds what every step makes.

    Theil-Sen slopes (Sen 1968) over all samples after the first fifth and over their last half: memory that
    grows only until all buffers are made has levelled off by then.
    """
    times, rule = recording.times, "memory_growth"
    if times is None or len(times.step) < FEWEST_STEPS:
        return _too_few(rule, times)
    known = np.isfinite(times.memory) & (times.system_at > times.initialisation)
    at, memory = times.system_at[known].astype(float), times.memory[known] / 1e6
    at, memory = at[len(at) // 5 :], memory[len(memory) // 5 :]
    if len(at) < samples:
        return not_evaluated(rule, f"memory was sampled {len(at)} times after warm-up; {samples:.0f} are needed")
    from scipy.stats import theilslopes

    slope, _, low, high = theilslopes(memory, at, alpha=0.95)
    late = theilslopes(memory[len(at) // 2 :], at[len(at) // 2 :], alpha=0.95)
    growth, level = float(low) * float(at[-1] - at[0]), float(np.median(memory))
    evidence = {
        "mb_per_minute": 60 * float(slope),
        "interval": [60 * float(low), 60 * float(high)],
        "last_half_mb_per_minute": 60 * float(late[0]),
        "median_mb": level,
        "seconds": float(at[-1] - at[0]),
    }
    # A leak goes on at its pace; a cache or an allocator's pool fills and slows down.
    goes_on = late[2] > 0 and late[0] > slope / 2
    if growth <= max(megabytes, share * level) or not goes_on:
        seen = f"memory changed by {60 * slope:+.1f} MB a minute around {level:,.0f} MB"
        return ok(rule, f"{seen} and does not keep growing" if slope > 0 else seen, evidence)
    return fired(
        rule,
        f"memory grows by {60 * slope:,.0f} MB a minute (95 % interval {60 * low:,.0f} to {60 * high:,.0f}) "
        f"around {level:,.0f} MB, and does not level off",
        evidence=evidence,
        advice="something keeps the tensors of past steps: in callbacks and own code keep numbers (`float(loss)`, "
        "`tensor.detach()`), not results that hold a graph",
    )


def step_outliers(
    recording: Recording, *, factor: float, deviations: float, share: float, seconds: float
) -> Finding:
    """Some steps take far longer than the others, and that adds up.

    A step is one if it takes `factor` times the median and lies `deviations` robust standard deviations (from the
    median absolute deviation) above it. What counts is the time beyond the median.
    """
    times, rule = recording.times, "step_outliers"
    if times is None or len(times.step) < FEWEST_STEPS:
        return _too_few(rule, times)
    median, slow = outliers(times, factor=factor, deviations=deviations)
    lost = float((times.step[slow] - median).sum())
    steps = np.flatnonzero(slow)
    worst = steps[np.argsort(-times.step[steps])][:WORST_SHOWN]
    evidence: dict[str, Any] = {
        "slow_steps": len(steps),
        "lost_seconds": lost,
        "lost_share": lost / max(float(times.step.sum()), 1e-9),
        "median_seconds": median,
    }
    if evidence["lost_share"] <= share or lost <= seconds:
        return ok(rule, f"{len(steps)} of {len(times.step):,} steps were far slower than the median", evidence)
    waited = float((times.wait[slow] / times.step[slow]).mean())
    others = used_by_others(times)
    evidence |= {
        "worst_steps": [times.first_step + int(step) for step in worst],
        "worst_seconds": [round(float(times.step[step]), 3) for step in worst],
        "waiting_for_data": waited,
        "cpu_used_by_others": others,
    }
    advice, remedy = _steadier(recording, times, waited, others)
    return fired(
        rule,
        f"{len(steps)} of {len(times.step):,} steps took more than {factor:g} times the median of "
        f"{1000 * median:.3g} ms and cost {lost:.1f} s ({evidence['lost_share']:.0%}); the slowest is step "
        f"{times.first_step + int(worst[0]):,} with {float(times.step[worst[0]]):.2g} s",
        evidence=evidence,
        advice=advice,
        remedy=remedy,
        first_step=_first(times, slow),
    )


def outliers(times: Times, *, factor: float, deviations: float) -> tuple[float, NDArray[np.bool_]]:
    """Return the median step, and which steps after the first few are far above it."""
    median = float(np.median(times.step))
    spread = SIGMA_PER_MAD * float(np.median(np.abs(times.step - median)))
    slow = times.step > max(factor * median, median + deviations * spread)
    slow[:WARMUP_STEPS] = False
    if times.device != "cpu":  # a sampled step is slow because it waits for the GPU
        slow[times.sampled - times.first_step] = False
    return median, slow


def used_by_others(times: Times) -> float:
    """Return the percentage of the machine that other processes used while it trained; NaN where unknown."""
    training = times.system_at > times.initialisation
    difference = (times.machine_cpu - times.cpu)[training]
    return float(np.nanmedian(difference)) if np.isfinite(difference).any() else float("nan")


def long_initialisation(recording: Recording, *, share: float, seconds: float) -> Finding:
    """A large share of the time passes before the training is under way, also inside its first step."""
    times, rule = recording.times, "long_initialisation"
    if times is None or len(times.step) < FEWEST_STEPS:
        return _too_few(rule, times)
    first = max(0.0, float(times.step[0] - np.median(times.step)))
    spent = times.initialisation + first
    part = spent / times.total
    evidence = {"initialisation_seconds": times.initialisation, "first_step_seconds": first, "share": part}
    seen = f"{spent:.1f} s ({part:.0%} of the time) passed before the training was under way"
    if part <= share or spent <= seconds:
        return ok(rule, seen, evidence)
    remedy: dict[str, Any] = {}
    if recording.recipe["trainer.compile"] and first > times.initialisation:
        advice, remedy = "compiling does not pay for so short a training", {"trainer.compile": False}
    elif times.resident and recording.recipe["trainer.data_on_device"] == "yes":
        advice, remedy = "let the images be read while it trains", {"trainer.data_on_device": "auto"}
    else:
        advice = "train more in one process, or look at what it does before the first step"
    return fired(rule, seen, evidence=evidence, advice=advice, remedy=remedy, first_step=times.first_step)


def _too_few(rule: str, times: Times | None) -> Finding:
    if times is None:
        return not_evaluated(rule, "no times were recorded")
    return not_evaluated(rule, f"{len(times.step)} steps were timed; {FEWEST_STEPS} are needed")


def _wait(times: Times) -> tuple[float, float]:
    """Return the seconds that the steps waited for data, and their share of the steps' time."""
    wait = times.split()["data"]
    return wait, wait / max(times.training, 1e-9)


def _first(times: Times, which: NDArray[np.bool_]) -> int | None:
    return times.first_step + int(which.argmax()) if which.any() else None


def _faster_data(recording: Recording, times: Times) -> tuple[str, dict[str, Any]]:
    recipe, workers = recording.recipe, times.loader_workers
    if times.resident:
        return "augmentation takes that time: do without its costliest part (augment.*)", {}
    if recipe["trainer.data_on_device"] == "no":
        return "keep the images on the device, if they fit", {"trainer.data_on_device": "auto"}
    if workers < times.cores:
        return "read with more workers", {"trainer.workers": min(times.cores, 2 * workers or 2)}
    return "all cores read data already: store smaller images, or augment less", {}


def _steadier(recording: Recording, times: Times, waited: float, others: float) -> tuple[str, dict[str, Any]]:
    if waited > 0.5:
        return _faster_data(recording, times)
    if times.device == "cpu" and others > MUCH_OTHER_USE:
        if times.threads > 1:
            advice = "other processes use this machine: fewer threads wait less for each other"
            return advice, {"trainer.threads": times.threads // 2}
        return f"other processes used {others:.0f} % of the processor meanwhile: train when it is free", {}
    return "look at what happens at these steps, in this process and beside it", {}
