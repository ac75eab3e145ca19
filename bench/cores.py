"""What a core more is worth, and bf16: samples/s, and dollars an image where the price goes with the cores.

    python bench/cores.py [--experiment mnist] [--rounds 3] [--epochs 1]

In each round: the full stage on one core, on all cores, on one core each side by side, on all cores with bf16.
Within a family EC2's price is proportional to the cores, so the dollars of an image are cores by samples/s.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workplace import FOLDER, machine, prepared, trained

from cnn_tuning.machine import usable_cores


def main() -> None:
    """Measure in alternation and print the ratios to one core."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="mnist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    print(machine())
    folder, cores = prepared(options.experiment), usable_cores()
    fixed = (f"experiment={options.experiment}", f"trainer.max_epochs={options.epochs}")
    ways = {
        "one core": (1, 1, "trainer.threads=1"),
        f"{cores} cores": (1, cores, f"trainer.threads={cores}"),
        f"{cores} trainings, one core each": (cores, cores, "trainer.threads=1"),
        f"{cores} cores, bf16": (1, cores, f"trainer.threads={cores}", "trainer.precision=bf16"),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        rates = {name: _rate(folder, at_once, *fixed, *own) for name, (at_once, _, *own) in ways.items()}
        one = rates["one core"]
        for name, rate in rates.items():
            taken[name].append((rate / one, ways[name][1] * one / rate))
        told = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        print(f"round {turn + 1}, samples/s: {told}", flush=True)
    for name, pairs in taken.items():
        speeds = [speed for speed, _ in pairs]
        dollars = statistics.median(dollars for _, dollars in pairs)
        print(
            f"{name}: {statistics.median(speeds):.2f} times the speed of one core "
            f"({min(speeds):.2f} to {max(speeds):.2f}), {dollars:.2f} times its dollars an image"
        )


def _rate(folder: Path, at_once: int, *overrides: str) -> float:
    """Return the samples/s of one training, or of several at once together."""
    with ThreadPoolExecutor(at_once) as pool:
        done = [pool.submit(trained, folder, FOLDER / f"cores-{i}", *overrides) for i in range(at_once)]
        return sum(one.result()["samples_per_second"] for one in done)


if __name__ == "__main__":
    main()
