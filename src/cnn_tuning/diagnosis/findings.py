"""A rule's answer: what it saw, what that means and what to change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "fired", "not evaluated"]


@dataclass(frozen=True)
class Finding:
    """One rule's answer.

    `first_step`: the first step at which it held. `evidence`: the numbers that it rests on. `explanation`: what
    was seen, or why nothing could be said; `advice`: what to do; `remedy`: dotted name → value, a patch of the
    recipe that does it (empty where no value of the configuration helps).
    """

    rule: str
    status: Status
    explanation: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    first_step: int | None = None
    advice: str = ""
    remedy: Mapping[str, Any] = field(default_factory=dict)


def fired(
    rule: str,
    explanation: str,
    *,
    evidence: Mapping[str, Any],
    advice: str,
    remedy: Mapping[str, Any] | None = None,
    first_step: int | None = None,
) -> Finding:
    """Return the finding of a rule that found something."""
    return Finding(rule, "fired", explanation, evidence, first_step, advice, remedy or {})


def ok(rule: str, explanation: str, evidence: Mapping[str, Any] | None = None) -> Finding:
    """Return the finding of a rule that looked and found nothing."""
    return Finding(rule, "ok", explanation, evidence or {})


def not_evaluated(rule: str, reason: str, evidence: Mapping[str, Any] | None = None) -> Finding:
    """Return the finding of a rule that cannot tell: too little was recorded, or it does not apply."""
    return Finding(rule, "not evaluated", reason, evidence or {})


def findings_json(findings: Sequence[Finding]) -> str:
    """Return findings as JSON, which has no word for what is not a number: null."""
    plain = [_known(asdict(finding)) for finding in findings]
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _known(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_known(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write findings as JSON."""
    path.write_text(findings_json(findings) + "\n")


def read_findings(path: Path) -> list[Finding]:
    """Read what `write_findings` wrote."""
    return [Finding(**entry) for entry in json.loads(path.read_text())]


def line(finding: Finding) -> str:
    """Return a finding as one line: what was seen, and what to do."""
    patch = patch_text(finding)
    advice = f"; {finding.advice}" if finding.advice and finding.status == "fired" else ""
    return f"{finding.rule}: {finding.explanation}{advice}{f' ({patch})' if patch else ''}"


def patch_text(finding: Finding) -> str:
    """Return a finding's remedy as overrides of a command line."""
    return " ".join(f"{name}={_value(value)}" for name, value in finding.remedy.items())


def _value(value: Any) -> str:
    """Return a value in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_value(own)}" for name, own in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def rules_fired(findings: Sequence[Finding]) -> list[str]:
    """Return the names of the rules that fired."""
    return [finding.rule for finding in findings if finding.status == "fired"]


def tags_of(findings: Sequence[Finding]) -> dict[str, str]:
    """Return the tags of a run: the names of the rules that fired, and the explanation of each."""
    return {
        "findings": ", ".join(rules_fired(findings)) or "none",
        **{f"finding.{f.rule}": f.explanation[:450] for f in findings if f.status == "fired"},
    }


def metrics_of(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many rules fired, are ok, or could not be evaluated, and for each that was evaluated 1 or 0."""
    count = {status: sum(f.status == status for f in findings) for status in ("fired", "ok", "not evaluated")}
    rules = {f.rule: int(f.status == "fired") for f in findings if f.status != "not evaluated"}
    return {"fired": count["fired"], "ok": count["ok"], "not_evaluated": count["not evaluated"], **rules}
