"""The properties of tests/fuzz for longer: damaged files and requests, inputs tried and crashes by target.

    python bench/fuzz.py --minutes 10 [--seed 0] [--only pictures,front]

Targets take turns until the time is up, each turn with inputs of its own. A crash is printed with its input (short
ones whole) and its place, each place once; exit status 1 where there was one. Inputs that crashed are kept in
`--out` (scratch/fuzz).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/fuzz"), str(ROOT / "tests/serving")]

from hypothesis import HealthCheck, Phase, given, seed, settings
from mutations import Target
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from workplace import machine

TURN = 200  # inputs of one target in one turn; of slow ones, as many as are in a test


def main() -> int:
    """Take turns until the time is up; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "scratch/fuzz")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(machine())
    inputs, crashes, seconds, places = Counter[str](), Counter[str](), Counter[str](), set[str]()
    with targets(options.only) as chosen:
        began, turn = time.monotonic(), 0
        while time.monotonic() - began < options.minutes * 60:
            for target in chosen:
                at = time.monotonic()
                tried, crash = one_turn(target, options.seed * 1_000_003 + turn)
                seconds[target.name] += time.monotonic() - at
                inputs[target.name] += tried
                if crash is not None:
                    crashes[target.name] += 1
                    report(target, *crash, places, options.out)
                if time.monotonic() - began >= options.minutes * 60:
                    break
            turn += 1
            left = options.minutes - (time.monotonic() - began) / 60
            tried, found = inputs.total(), len(places)
            print(f"turn {turn}: {tried:,} inputs, {found} places of crashes, {left:.1f} min left")
    table = Table(box=MARKDOWN)
    for title in ("target", "inputs tried", "turns with a crash", "inputs a second"):
        table.add_column(title, justify="left" if title == "target" else "right", no_wrap=True)
    for name in inputs:
        table.add_row(name, f"{inputs[name]:,}", str(crashes[name]), f"{inputs[name] / seconds[name]:,.0f}")
    table.add_row("all", f"{inputs.total():,}", str(crashes.total()), "")
    Console(width=120, highlight=False).print(table)
    return int(bool(places))


@contextmanager
def targets(only: str) -> Iterator[list[Target]]:
    """Give the targets that are named, all without a name; a front runs while they are used."""
    import readers

    chosen = [*readers.targets(), *readers.slow_targets()]
    names = [name for name in only.split(",") if name]
    wanted = [target for target in chosen if not names or target.name in names]
    if names and "front" not in names:
        yield wanted
        return
    from requests_to_front import front_targets

    with front_targets() as more:
        yield [*wanted, *more]


def one_turn(target: Target, number: int) -> tuple[int, tuple[Any, BaseException] | None]:
    """Try new inputs; return how many, and the first that crashed."""
    tried, crash = 0, None

    @seed(number)
    @settings(
        max_examples=TURN if target.examples >= 20 else target.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def holds(data: Any) -> None:
        nonlocal tried, crash
        if crash is not None:
            return
        tried += 1
        try:
            target.check(data)
        except Exception as error:
            crash = data, error

    holds()
    return tried, crash


def report(target: Target, data: Any, error: BaseException, places: set[str], out: Path) -> None:
    """Print a crash at a new place, and keep its input."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "cnn_tuning" in frame.filename] or list(frames)
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno} {type(error).__name__}"
    if f"{target.name} {place}" in places:
        return
    places.add(f"{target.name} {place}")
    raw = data if isinstance(data, bytes) else repr(data).encode()
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{target.name.replace(' ', '-')}-{hashlib.sha256(raw).hexdigest()[:8]}"
    file.write_bytes(raw)
    print(f"CRASH of {target.name} at {place}: {str(error)[:300]}\n  {os.path.relpath(file)}: {raw[:200]!r}")


if __name__ == "__main__":
    sys.exit(main())
