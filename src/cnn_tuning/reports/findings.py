"""Findings for a terminal: what fired first, with evidence and remedy, then the other rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_tuning.diagnosis.findings import Finding, patch_text

MOST_VALUES = 8
COLOURS = {"fired": "red", "ok": "green", "not evaluated": "dim"}


def print_findings(name: str, findings: Sequence[Finding]) -> None:
    """Print a block for each rule that fired, and a line for each other one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        about = Text(finding.explanation)
        if finding.status == "fired":
            step = f"first at step {finding.first_step:,}; " if finding.first_step is not None else ""
            about.append(f"\n{step}{evidence_text(finding.evidence)}", "dim")
            about.append(f"\n{finding.advice}" if finding.advice else "")
            about.append(f"\n{patch_text(finding)}" if finding.remedy else "", "bold")
        table.add_row(Text(finding.status, COLOURS[finding.status]), Text(finding.rule, "bold"), about)
    fired = [finding for finding in findings if finding.status == "fired"]
    console = Console(highlight=False)
    console.print(Text(f"{name}: {len(fired)} of {len(findings)} rules fired", "bold"))
    console.print(table)
    curable = next((finding for finding in fired if finding.remedy), None)
    if curable:
        console.print(Text(f"\nProve a remedy: cnn-tuning cure {name} --rule {curable.rule}"), soft_wrap=True)


def evidence_text(evidence: Mapping[str, Any]) -> str:
    """Return the numbers of a finding in a line."""
    return "; ".join(f"{name.replace('_', ' ')} {value_text(value)}" for name, value in evidence.items())


def value_text(value: Any) -> str:
    """Return a value of the evidence as a person reads it, of long lists the first entries."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        more = f", … ({len(value)} in all)" if len(value) > MOST_VALUES else ""
        return ", ".join(map(value_text, value[:MOST_VALUES])) + more
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
