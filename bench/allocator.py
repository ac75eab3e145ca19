"""What it is worth to keep freed memory: steps of a training with `prepare_process` and without, in turns.

    python bench/allocator.py [--rounds 5] [--experiments mnist lab]

Each measurement is a process of its own with the experiment's network, batch size and optimizer on random images,
on all cores. Goes out: samples/s, the ratio within a round, and the share of the processor's time that the system
takes. The loss after the last step must be the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from workplace import ROOT, machine

STEPS = """
import json, os, sys, time
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
if sys.argv[1] == "kept":
    from cnn_tuning.machine import prepare_process
    prepare_process()
import torch
import torch.nn.functional as F
from cnn_tuning.config import Recipe, compose, select
from cnn_tuning.models.network import build_network
from cnn_tuning.training.optimisation import build_optimizer

recipe = select(Recipe, compose([f"experiment={sys.argv[2]}"], params=None))
torch.manual_seed(0)
torch.set_num_threads(len(os.sched_getaffinity(0)))
network = build_network(recipe.model, (1, 28, 28), 10, (0.13,), (0.31,)).to(memory_format=torch.channels_last)
optimizer = build_optimizer(network, recipe.optimizer, fused=True)
size, steps = recipe.trainer.batch_size, int(sys.argv[3])
images = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8)
labels = torch.randint(0, 10, (size,))
for number in range(-10, steps):
    if number == 0:
        before, began = os.times(), time.perf_counter()
    optimizer.zero_grad()
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
seconds, after = time.perf_counter() - began, os.times()
user, system = after.user - before.user, after.system - before.system
print(json.dumps({"rate": steps * size / seconds, "system": system / (user + system), "loss": loss.item().hex()}))
"""


def main() -> None:
    """Measure in alternation and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--experiments", nargs="+", default=["mnist", "lab"])
    options = parser.parse_args()
    print(machine())
    for experiment in options.experiments:
        rounds = [
            {way: _steps(way, experiment, options.steps) for way in ("given back", "kept")}
            for _ in range(options.rounds)
        ]
        ratios = [turn["kept"]["rate"] / turn["given back"]["rate"] for turn in rounds]
        told = ", ".join(
            f"{way} {statistics.median(turn[way]['rate'] for turn in rounds):,.0f} samples/s "
            f"({statistics.median(turn[way]['system'] for turn in rounds):.1%} in the system)"
            for way in rounds[0]
        )
        same = len({turn[way]["loss"] for turn in rounds for way in turn}) == 1
        print(
            f"{experiment}: {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f}): {told}; the same bits: {same}",
            flush=True,
        )


def _steps(way: str, experiment: str, steps: int) -> dict[str, float]:
    command = [sys.executable, "-c", STEPS, way, experiment, str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
