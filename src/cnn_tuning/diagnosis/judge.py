"""Ask every rule about a recording: configuration and recording in, findings out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cnn_tuning.config import DiagnosisConfig, Recipe
from cnn_tuning.diagnosis.findings import Finding, rules_fired
from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.diagnosis.rules import AT_THE_END, RULES, thresholds_of
from cnn_tuning.errors import UserError

if TYPE_CHECKING:
    from cnn_tuning.data.packed import PackedData

# Where one of these fires, a range test tells which rate would do: a hundred steps, and only then.
RATE_RULES = {"learning_rate_too_high", "learning_rate_too_low", "loss_not_decreasing", "stalled", "not_finite"}


def judge(recording: Recording, config: DiagnosisConfig) -> list[Finding]:
    """Return the findings of all rules that are not off: those that fired first, in the order of `RULES`."""
    findings = [
        RULES[name](recording, **config.rules[name].thresholds)
        for name in RULES
        if name in config.rules and config.rules[name].action != "off"
    ]
    order = {"fired": 0, "ok": 1, "not evaluated": 2}
    return sorted(findings, key=lambda finding: order[finding.status])


def diagnose(
    recording: Recording, config: DiagnosisConfig, recipe: Recipe | None = None, data: PackedData | None = None
) -> tuple[Recording, list[Finding]]:
    """Judge a recording; where its learning rate is in doubt and recipe and data are given, test the range."""
    findings = judge(recording, config)
    doubtful = RATE_RULES.intersection(rules_fired(findings))
    if doubtful and recipe is not None and data is not None and recording.sweep is None:
        from cnn_tuning.diagnosis.range_test import range_test  # torch, only where it is needed

        recording = replace(recording, sweep=range_test(recipe, data))
        findings = judge(recording, config)
    return recording, findings


def check_rules(config: DiagnosisConfig) -> None:
    """Raise one `UserError` that names every rule and threshold that does not exist or is missing."""
    problems = list(_problems(config))
    if problems:
        raise UserError("diagnosis:\n" + "\n".join(f"  {line}" for line in problems))


def _problems(config: DiagnosisConfig) -> Iterator[str]:
    for name, rule in config.rules.items():
        if name not in RULES:
            yield f"diagnosis.rules.{name}: no such rule{_nearest(name, list(RULES))}"
            continue
        if rule.action == "stop" and name in AT_THE_END:
            yield f"diagnosis.rules.{name}.action: it is judged at the end, when nothing is left to stop: warn"
        known = thresholds_of(name)
        for threshold in rule.thresholds:
            if threshold not in known:
                place = f"diagnosis.rules.{name}.thresholds.{threshold}"
                yield f"{place}: no such threshold{_nearest(threshold, known)}"
        for threshold in known:
            if threshold not in rule.thresholds:
                yield f"diagnosis.rules.{name}.thresholds.{threshold}: missing"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
