"""The profile of one training as one self-contained page: recording, findings and operators in, HTML out."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.findings import Finding, patch_text
from cnn_tuning.diagnosis.recording import Recording, Times
from cnn_tuning.diagnosis.rules import RULES
from cnn_tuning.diagnosis.rules.profile import MUCH_OTHER_USE, outliers, used_by_others
from cnn_tuning.reports import profile_plots as plots
from cnn_tuning.reports.findings import evidence_text
from cnn_tuning.reports.page import embedded, render

if TYPE_CHECKING:
    from cnn_tuning.diagnosis.trace import Operator

PROFILE = "profile.html"
MOST_OPERATORS = 20
# Marked in the plot of steps; whether they matter is for the rule of that name.
SLOW = {"factor": 3.0, "deviations": 6.0}
PARTS = {
    "initialisation": ("initialisation", "#9aa7b1"),
    "data": ("waiting for data", "#d9772b"),
    "steps": ("steps", "#1f6fb4"),
    "forward": ("forward", "#1f6fb4"),
    "backward": ("backward", "#154d7e"),
    "optimiser": ("optimiser", "#5fa8dd"),
    "rest": ("rest of the step", "#b5d3ea"),
    "validation": ("validation", "#3f9c6b"),
    "logging": ("callbacks, records, checkpoints", "#c9a227"),
}


@dataclass(frozen=True)
class _Part:
    name: str
    colour: str
    weight: str
    seconds: str
    share: str


def write_profile(
    path: Path,
    recording: Recording,
    findings: Sequence[Finding],
    operators: Sequence[Operator] | None = None,
    title: str = "training",
) -> None:
    """Write the page; of the findings it shows those of the profile's rules."""
    times = recording.times
    own = [finding for finding in findings if _is_profile(finding.rule)]
    path.write_text(
        render(
            "profile.html.jinja",
            title=f"Profile of {title}",
            headline=_headline(times, own),
            tiles=_tiles(recording, times) if times is not None else [],
            fired=[_shown(finding) for finding in own if finding.status == "fired"],
            others=[_shown(finding) for finding in own if finding.status != "fired"],
            split=_split(times) if times is not None else [],
            split_note=_split_note(times, bool(operators)) if times is not None else "",
            **_pictures(recording, times, path.parent),
            operators=_table(operators) if operators else None,
            operators_note=_operators_note(operators) if operators else "",
            facts=_facts(recording, times),
        )
    )


def _is_profile(rule: str) -> bool:
    return rule in RULES and RULES[rule].__module__.rpartition(".")[2] in {"profile", "gpu"}


def _headline(times: Times | None, findings: Sequence[Finding]) -> str:
    if times is None:
        return "No times were recorded."
    parts = {name: seconds for name, seconds in times.split().items() if seconds > 0}
    most = max(parts, key=lambda name: parts[name])
    fired = sum(finding.status == "fired" for finding in findings)
    rules = "no rule fired" if fired == 0 else "one rule fired" if fired == 1 else f"{fired} rules fired"
    share, others = times.training / times.total, used_by_others(times)
    busy = f" Other processes used {others:.0f} % of the processor meanwhile." if others > MUCH_OTHER_USE else ""
    return (
        f"{_seconds(times.total)} in all, {share:.0%} of them in training steps; the largest part was "
        f"{PARTS[most][0]} with {parts[most] / times.total:.0%}. "
        f"Of the profile's {len(findings)} rules {rules}.{busy}"
    )


def _tiles(recording: Recording, times: Times) -> list[tuple[str, str, str]]:
    recipe = recording.recipe
    where = "GPU" if times.device != "cpu" else "CPU"
    threads = f"{times.threads} thread{'s' if times.threads > 1 else ''} of {times.cores} cores"
    rate = times.samples / times.training if times.training else 0.0
    tiles = [
        ("duration", _seconds(times.total), f"{len(times.step):,} steps"),
        ("samples a second", f"{rate:,.0f}", "while training"),
        ("device", where, threads),
        ("batch", f"{recipe['trainer.batch_size']:,}", f"precision {times.precision}"),
    ]
    if len(times.step):
        median, last = np.percentile(times.step, [50, 99])
        tiles.append(("step", _milliseconds(median), f"median; 99 % below {_milliseconds(last)}"))
    data = "on the device" if times.resident else f"{times.loader_workers} workers read them"
    wait = times.split()["data"] / max(times.training, 1e-9)
    tiles.append(("waiting for data", f"{wait:.1%}", f"of the steps; data {data}"))
    return tiles


def _split(times: Times) -> list[_Part]:
    return [
        _Part(
            name=PARTS[name][0],
            colour=PARTS[name][1],
            weight=f"{max(seconds, 0) / times.total:.4f}",
            seconds=f"{seconds:,.2f}" if times.total < 100 else f"{seconds:,.1f}",
            share=f"{seconds / times.total:.1%}",
        )
        for name, seconds in times.split().items()
    ]


def _split_note(times: Times, traced: bool) -> str:
    note = (
        f"Totals and the wait for data are measured; forward to rest are estimated from {len(times.sampled):,} "
        f"sampled steps. Initialisation lasts until the first batch is asked for."
    )
    if times.device != "cpu":
        note += " The wait for data counts as far as the GPU was idle for it."
    if traced:
        note += " Tracing slowed the traced steps, and its writing counts as callbacks."
    if times.first_step > 1:
        note += f" The training went on from step {times.first_step - 1:,}: this is of the steps after it only."
    return note


def _pictures(recording: Recording, times: Times | None, beside: Path) -> dict[str, Any]:
    if times is None or len(times.step) == 0:
        return {"steps": "", "step_pictures": [], "use_pictures": []}
    _, slow = outliers(times, **SLOW)
    # What a kill leaves there is removed with the output by the next start.
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        drawn, used = Path(folder) / "steps.png", Path(folder) / "use.png"
        ends = [int(step) for step in recording.curves.epoch_step if step >= times.first_step]
        plots.step_times(times, slow, ends, drawn)
        step_pictures = embedded([("Time of each step; upright lines: ends of epochs", drawn)])
        use_pictures = []
        if np.isfinite(times.cpu).sum() > 1:
            plots.utilisation(times, used)
            use_pictures = embedded([("What the run used over time", used)])
    return {"steps": _steps(times, slow), "step_pictures": step_pictures, "use_pictures": use_pictures}


def _steps(times: Times, slow: NDArray[np.bool_]) -> str:
    values = np.percentile(times.step, plots.PERCENTILES)
    names = ["median (p50)", "p90", "p99", "longest"]
    told = ", ".join(f"{name} {_milliseconds(value)}" for name, value in zip(names, values, strict=True))
    count = int(slow.sum())
    if count == 0:
        return f"{told}. No step after the first few was far slower than the median."
    steps = times.first_step + np.flatnonzero(slow)
    worst = steps[np.argsort(-times.step[slow])][:5]
    listed = ", ".join(f"{step:,}" for step in worst)
    share = float(times.step[slow].sum() / times.step.sum())
    which = f"step {listed}" if count == 1 else f"{count} steps, the slowest {listed},"
    return f"{told}. Far slower than the median: {which} with {share:.1%} of the steps' time."


def _table(operators: Sequence[Operator]) -> SimpleNamespace:
    """Return the operators that took longest, as `tabulate` takes a table."""
    on_gpu = any(operator.self_gpu_s for operator in operators)
    head = ["operator", "share", "calls", "CPU, own", "CPU, with callees"]
    rows = []
    for one in operators[:MOST_OPERATORS]:
        times = [one.self_cpu_s, one.cpu_s, *([one.self_gpu_s, one.gpu_s] if on_gpu else [])]
        cells = [one.name, f"{one.share:.1%}", f"{one.calls:,}", *map(_milliseconds, times)]
        rows.append([SimpleNamespace(text=cell, strong=False) for cell in cells])
    gpu = ["GPU, own", "GPU, with callees"] if on_gpu else []
    return SimpleNamespace(head=head + gpu, rows=rows, names=1)


def _operators_note(operators: Sequence[Operator]) -> str:
    where = "GPU" if any(operator.self_gpu_s for operator in operators) else "CPU"
    shown = min(len(operators), MOST_OPERATORS)
    return (
        f"{shown} of {len(operators)} operators, all of them in operators.csv; shares are of the {where} time "
        "of the traced steps. trace.json.gz beside this page opens in https://ui.perfetto.dev."
    )


def _shown(finding: Finding) -> SimpleNamespace:
    return SimpleNamespace(
        rule=finding.rule.replace("_", " "),
        status=finding.status,
        since="" if finding.first_step is None else f"first at step {finding.first_step:,}",
        explanation=finding.explanation,
        advice=finding.advice,
        evidence=evidence_text(finding.evidence),
        remedy=patch_text(finding),
    )


def _facts(recording: Recording, times: Times | None) -> dict[str, str]:
    recipe = recording.recipe
    facts = {"network": str(recipe["model.name"]), "seed": str(recipe["seed"])}
    if times is not None and len(times.step):
        facts["steps"] = f"{times.first_step:,} to {times.first_step + len(times.step) - 1:,}"
        facts["system"] = f"sampled {len(times.system_at):,} times"
    names = ("precision", "compile", "channels_last", "data_on_device", "workers", "threads")
    facts |= {f"trainer.{name}": str(recipe[f"trainer.{name}"]) for name in names}
    facts["torch"] = importlib.metadata.version("torch")
    return facts


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s" if value < 600 else f"{value / 60:,.0f} min"


def _milliseconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{1000 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
