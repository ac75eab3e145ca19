"""Precision and recall of the diagnosis rules on real trainings: sick ones on purpose, and healthy ones.

    python bench/diagnosis_rules.py [--seeds 2] [--first-seed 10] [--only NAME] [--verbose]

Every case of `sickness.py` is trained with each seed, with the recorder and the thresholds that are shipped.
Recall of a rule: of the trainings that are sick with what it finds, those on which it fired; "not evaluated"
counts as missed. Precision: of its firings, those on such trainings; the false ones are firings on healthy
trainings, and on others whose sickness does not bring this one with it (`also` in `sickness.py` says which do;
those count neither way). Healthy trainings are judged after each epoch as well: what fires then is false, too.

Thresholds, cases and what is in `also` were settled on seeds 0 to 3: the figures are those of other seeds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from sickness import HEALTHY, SICK, Case, train
from workplace import machine

from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.rules import RULES


@dataclass(frozen=True)
class Trained:
    """A case with a seed, what each rule said, and which fired after any epoch of a healthy one."""

    case: Case
    seed: int
    status: dict[str, str]
    live: frozenset[str]


@dataclass(frozen=True)
class Score:
    """Counts of one rule: trainings and firings among them."""

    sick: int
    found: int
    healthy: int
    false: int
    others: int
    false_others: int

    @property
    def recall(self) -> float:
        """Return the share of the sick that were found."""
        return self.found / self.sick if self.sick else float("nan")

    @property
    def precision(self) -> float:
        """Return the share of right firings."""
        fired = self.found + self.false + self.false_others
        return self.found / fired if fired else float("nan")


def main() -> None:
    """Train all cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--first-seed", type=int, default=10, help="0 to 3 were looked at while thresholds were set"
    )
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--verbose", action="store_true", help="tell what each rule that fired said")
    options = parser.parse_args()
    print(machine(), flush=True)
    cases = [case for case in (*SICK, *HEALTHY) if options.only in case.name]
    trained: list[Trained] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases):
            for index, seed in enumerate(range(options.first_seed, options.first_seed + options.seeds)):
                began = time.monotonic()
                live: set[str] = set()
                findings = train(case, seed, Path(scratch), None if case.sick else live)
                trained.append(Trained(case, seed, {f.rule: f.status for f in findings}, frozenset(live)))
                done = f"{number * options.seeds + index + 1}/{len(cases) * options.seeds}"
                print(f"{done} {_line(case, seed, findings)} ({time.monotonic() - began:.1f} s)", file=sys.stderr)
                if options.verbose:
                    _tell(findings)
    print_sicknesses(trained, options.seeds)
    print_scores(trained)
    print_live([t for t in trained if not t.case.sick])


def print_live(healthy: Sequence[Trained]) -> None:
    """Print which rules fired on healthy trainings that were judged after each epoch."""
    counts = {rule: sum(rule in t.live for t in healthy) for rule in RULES}
    false = ", ".join(f"`{rule}` {count}" for rule, count in counts.items() if count) or "none"
    print(f"\nFired after some epoch of {len(healthy)} healthy trainings: {false}")


def _line(case: Case, seed: int, findings: Sequence[Finding]) -> str:
    fired = {f.rule for f in findings if f.status == "fired"}
    missed, false = sorted(case.sick - fired - _unknown(case)), sorted(fired - case.sick - case.also)
    verdict = "; ".join([*(f"MISSED {rule}" for rule in missed), *(f"FALSE {rule}" for rule in false)])
    return f"{case.name}, seed {seed}: {verdict or 'as expected'}"


def _tell(findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.status == "fired":
            print(f"    {finding.rule}: {finding.explanation} → {dict(finding.remedy)}", file=sys.stderr)


def _unknown(case: Case) -> frozenset[str]:
    return case.sick - set(RULES)


def print_sicknesses(trained: Sequence[Trained], seeds: int) -> None:
    """Print what each sickness must and may fire, and what did."""
    print("\n| sickness | must fire (in how many trainings it did) | fired too, as may be |\n|---|---|---|")
    for case in dict.fromkeys(t.case for t in trained if t.case.sick):
        of_case = [t for t in trained if t.case == case]
        count = {rule: sum(t.status.get(rule) == "fired" for t in of_case) for rule in RULES}
        must = ", ".join(f"`{rule}` {count.get(rule, 0)}/{seeds}" for rule in sorted(case.sick))
        also = ", ".join(f"`{rule}` {count[rule]}" for rule in sorted(case.also) if count.get(rule))
        print(f"| {case.name} | {must} | {also} |")


def print_scores(trained: Sequence[Trained]) -> None:
    """Print recall and precision of each rule and of all."""
    print(
        "\n| rule | sick | found | recall | healthy | false | sick otherwise | false | precision |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    judged = {rule for t in trained for rule, status in t.status.items() if status != "not evaluated"}
    scores = {rule: score(rule, trained) for rule in RULES if rule in judged}
    for rule, s in scores.items():
        print(
            f"| `{rule}` | {s.sick} | {s.found} | {_percent(s.recall)} | {s.healthy} | {s.false} | {s.others} | "
            f"{s.false_others} | {_percent(s.precision)} |"
        )
    columns = ("sick", "found", "healthy", "false", "others", "false_others")
    whole = Score(*(sum(getattr(s, column) for s in scores.values()) for column in columns))
    print(
        f"| all | {whole.sick} | {whole.found} | {_percent(whole.recall)} | {whole.healthy} | {whole.false} | "
        f"{whole.others} | {whole.false_others} | {_percent(whole.precision)} |"
    )
    sick = sum(bool(t.case.sick) for t in trained)
    print(f"\n{len(trained)} trainings: {sick} sick, {len(trained) - sick} healthy")
    left_out = [rule for rule in RULES if rule not in scores]
    if left_out:
        print(f"Never evaluated, for want of a GPU or of time: {', '.join(left_out)}")


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.0%}"


def score(rule: str, trained: Sequence[Trained]) -> Score:
    """Count a rule's firings."""
    fired = {id(t) for t in trained if t.status.get(rule) == "fired"}
    sick = [t for t in trained if rule in t.case.sick]
    healthy = [t for t in trained if not t.case.sick]
    others = [t for t in trained if t.case.sick and rule not in t.case.sick | t.case.also]
    counts = [(len(group), sum(id(t) in fired for t in group)) for group in (sick, healthy, others)]
    return Score(*(value for pair in counts for value in pair))


if __name__ == "__main__":
    main()
