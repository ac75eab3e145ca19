"""Run the tests of tests/faults and print a row of FAULTS.md a line: `make faults`, `make faults ARGS=…`.

Arguments are pytest's. A row's name is the first line of its module's docstring, which begins with `Row N: `.
Exit status: pytest's, or 1 where a row has no test.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests/faults"
ROWS = range(1, 41)


class Tally:
    """A pytest plugin that keeps the outcome and the seconds of each test, by row."""

    def __init__(self) -> None:
        self.outcomes: dict[int, dict[str, str]] = defaultdict(dict)
        self.seconds: dict[int, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up a test's setup, call and teardown; the worst of their outcomes is the test's."""
        row = row_of(Path(report.location[0]))
        self.seconds[row] += report.duration
        worst = self.outcomes[row].get(report.nodeid, "passed")
        if report.outcome == "failed" or worst == "passed":
            self.outcomes[row][report.nodeid] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a module that does not load as a failed test."""
        if report.failed and report.nodeid.endswith(".py"):
            self.outcomes[row_of(Path(report.nodeid))][report.nodeid] = "failed"

    def result(self, row: int, *, exists: bool) -> tuple[str, str, str]:
        """Return a row's tests, result and seconds as they are shown."""
        outcomes = list(self.outcomes[row].values())
        if not outcomes:
            return "0", "not run" if exists else "MISSING", ""
        bad = len(outcomes) - outcomes.count("passed")
        worst = "FAIL" if "failed" in outcomes else "skipped"
        told = f"{worst} ({bad} of {len(outcomes)})" if bad else "pass"
        return str(len(outcomes)), told, f"{self.seconds[row]:.1f}"


def row_of(path: Path) -> int:
    """Return the row in a test file's name, 0 where there is none."""
    found = re.match(r"test_(\d\d)_", path.name)
    return int(found[1]) if found else 0


def names() -> Iterator[tuple[int, str]]:
    """Give each row that has a test, with its name."""
    for path in sorted(FAULTS.glob("test_*.py"), reverse=True):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        yield row_of(path), text.partition("\n")[0].partition(": ")[2]


def main(arguments: list[str]) -> int:
    """Run and print."""
    tally, known = Tally(), dict(names())
    files = [argument for argument in arguments if argument.partition("::")[0].endswith(".py")]
    status = pytest.main([*arguments, *([] if files else [str(FAULTS)])], [tally])
    table = Table(box=MARKDOWN)
    for title in ("row", "fault", "tests", "pass/fail", "seconds"):
        table.add_column(title, justify="left" if title in ("fault", "pass/fail") else "right", no_wrap=True)
    for row in ROWS:
        table.add_row(str(row), known.get(row, ""), *tally.result(row, exists=row in known))
    Console(width=180, highlight=False).print(table)
    return int(status) or int(any(row not in known for row in ROWS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
