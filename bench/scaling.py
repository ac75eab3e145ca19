"""How training scales to two processes: samples/s of one and two with one thread each, the same global batch.

    python bench/scaling.py [--experiment mnist] [--rounds 3] [--epochs 1] [--batch N] [--json FILE]
    python bench/scaling.py --learnt 5 --experiment digits [--epochs N] [--batch N] [--json FILE]

In each round: one process, one process with half the batch (what each of two computes), two processes. Then two
processes exchange as many bytes as the gradients have, and a few, again and again: that is the link. From it
`cloud.scaling` predicts what the two processes took: from the speed with the whole batch, which is what `host plan
--nodes` knows, and from that with half of it. Two processes need two idle cores.

`--learnt`: instead, what one and two processes learn by the same recipe, over so many seeds. On CPUs each
normalises by its own share of a batch, and each draws its own dropout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workplace import ROOT, machine, prepared

from cnn_tuning.cloud.scaling import Link, Work, exchange_seconds, predict

FIT = """
from cnn_tuning.machine import prepare_process; prepare_process()
import os
import json, sys, tempfile
from pathlib import Path
from cnn_tuning.config import Recipe, compose, select
from cnn_tuning.data.packed import PackedData
from cnn_tuning.training.fit import fit

recipe = select(Recipe, compose(sys.argv[2:]))
with tempfile.TemporaryDirectory() as folder:
    fitted = fit(recipe, PackedData.open(Path(sys.argv[1]) / "data/prepared"), state_folder=Path(folder))
steps = fitted.history[-1]["step"]
print(json.dumps({
    "samples_per_second": fitted.samples_per_second, "step_s": fitted.seconds["train"] / steps, "steps": steps,
    "batch": recipe.trainer.batch_size, "weights": sum(p.numel() for p in fitted.network.parameters()),
    "loss": fitted.history[-1]["train/loss"], "best": fitted.best,
}))
"""
EXCHANGE = """
import json, os, statistics, sys, time
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
taken = []
for count in (1, int(sys.argv[1]) // 4):
    tensor, times = torch.zeros(count), []
    for _ in range(60):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began)
    taken.append(statistics.median(times[10:]))
if dist.get_rank() == 0:
    print(json.dumps(taken), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def main() -> None:
    """Measure, predict, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="mnist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="(default: 1; with --learnt the experiment's)")
    parser.add_argument("--batch", type=int, help="The global batch (default: the experiment's).")
    parser.add_argument("--learnt", type=int, metavar="SEEDS", help="Compare what one and two processes learn.")
    parser.add_argument("--json", type=Path, help="Write the figures to this file, too.")
    options = parser.parse_args()
    print(machine())
    folder = prepared(options.experiment)
    overrides = [f"experiment={options.experiment}", "trainer.threads=1"]
    epochs = options.epochs or (None if options.learnt else 1)
    if epochs:
        overrides.append(f"trainer.max_epochs={epochs}")
    if options.batch:
        overrides.append(f"trainer.batch_size={options.batch}")
    if options.learnt:
        learnt = [_learnt(folder, overrides, seed) for seed in range(options.learnt)]
        _show_learnt(learnt)
        if options.json:
            figures = {"machine": machine(), "experiment": options.experiment, "seeds": learnt}
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
        return
    rounds = [_round(folder, overrides) for _ in range(options.rounds)]
    middle = sorted(rounds, key=lambda one: one["efficiency"])[len(rounds) // 2]
    figures = {"machine": machine(), "experiment": options.experiment, "rounds": rounds, **_compared(middle)}
    _show(rounds, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _round(folder: Path, overrides: list[str]) -> dict[str, Any]:
    one = _fit(folder, [*overrides, "trainer.devices=1"])
    half = _fit(folder, [*overrides, "trainer.devices=1", f"trainer.batch_size={one['batch'] // 2}"])
    two = _fit(folder, [*overrides, "trainer.devices=2"])
    small_s, large_s = _exchange(4 * one["weights"])
    efficiency = two["samples_per_second"] / (2 * one["samples_per_second"])
    return {
        "one": one,
        "half_batch": half,
        "two": two,
        "efficiency": efficiency,
        "smallest_exchange_s": small_s,
        "gradient_exchange_s": large_s,
    }


def _learnt(folder: Path, overrides: list[str], seed: int) -> dict[str, Any]:
    """Return the best epoch's row of one process and of two."""
    own = [*overrides, f"seed={seed}"]
    fits = {name: _fit(folder, [*own, f"trainer.devices={n}"]) for name, n in (("one", 1), ("two", 2))}
    return {"seed": seed, **{name: fitted["best"] for name, fitted in fits.items()}}


def _show_learnt(learnt: list[dict[str, Any]]) -> None:
    for name in ("val/accuracy", "val/loss"):
        pairs = [(row["one"][name], row["two"][name]) for row in learnt]
        for row, (one, two) in zip(learnt, pairs, strict=True):
            print(f"seed {row['seed']}: {name} {one:.4f} by one process, {two:.4f} by two")
        change = statistics.mean(two - one for one, two in pairs)
        print(f"{name}: two less one {change:+.4f} on average", end="")
        if len(pairs) > 1:
            scatter, own = (
                statistics.stdev(values) for values in ([t - o for o, t in pairs], [o for o, _ in pairs])
            )
            print(f" (standard deviation {scatter:.4f}); one process from seed to seed {own:.4f}", end="")
        print()


def _compared(one_round: dict[str, Any]) -> dict[str, Any]:
    """Return the link that a round's exchanges show, and the steps that are predicted with it."""
    gradient_bytes = 4 * one_round["one"]["weights"]
    # Between two, a sum is two turns of half the bytes.
    latency_s = one_round["smallest_exchange_s"] / 2
    speed = gradient_bytes / max(one_round["gradient_exchange_s"] - 2 * latency_s, 1e-9)
    link = Link(speed, latency_s)
    batch = one_round["one"]["batch"]
    # What one process makes of its half of a batch, not half of what it makes of the whole.
    work = Work(batch, 0, batch / (2 * one_round["half_batch"]["step_s"]), gradient_bytes)
    predicted = predict(work, 2, link)
    # What `host plan --nodes` has: it takes half a batch for half the time.
    planned = predict(Work(batch, 0, one_round["one"]["samples_per_second"], gradient_bytes), 2, link)
    return {
        "gradient_bytes": gradient_bytes,
        "bytes_sent_per_step": gradient_bytes,  # 2(n−1)/n of them, n = 2
        "link_bytes_per_s": speed,
        "link_latency_s": latency_s,
        "exchange_s": exchange_seconds(gradient_bytes, 2, link),
        "predicted_step_s": predicted.step_s,
        "planned_step_s": planned.step_s,
        "measured_step_s": one_round["two"]["step_s"],
        "predicted_samples_per_second": predicted.samples_per_second,
        "measured_samples_per_second": one_round["two"]["samples_per_second"],
    }


def _show(rounds: list[dict[str, Any]], figures: dict[str, Any]) -> None:
    for number, taken in enumerate(rounds, start=1):
        one, two = (taken[name]["samples_per_second"] for name in ("one", "two"))
        print(
            f"round {number}: one {one:,.0f}, two {two:,.0f} samples/s, efficiency {taken['efficiency']:.2f}; "
            f"gradients exchanged alone in {1000 * taken['gradient_exchange_s']:.2f} ms"
        )
    efficiency = statistics.median(one["efficiency"] for one in rounds)
    print(f"efficiency of two processes: {efficiency:.2f} (median; 1 is ideal)")
    sent, speed = figures["bytes_sent_per_step"] / 1e6, figures["link_bytes_per_s"] / 1e9
    print(
        f"each sends {sent:.2f} MB a step over {speed:.2f} GB/s and {1e6 * figures['link_latency_s']:.0f} µs a "
        f"message: {1000 * figures['exchange_s']:.2f} ms"
    )
    measured_s = figures["measured_step_s"]
    told = [
        f"predicted from {basis} {1000 * figures[name]:.2f} ms (ratio {figures[name] / measured_s:.2f})"
        for basis, name in (("half the batch", "predicted_step_s"), ("the whole batch", "planned_step_s"))
    ]
    print(f"step of two: measured {1000 * measured_s:.2f} ms; {', '.join(told)}")


def _fit(folder: Path, overrides: list[str]) -> dict[str, Any]:
    return json.loads(_run([sys.executable, "-c", FIT, str(folder), *overrides], {}).splitlines()[-1])


def _exchange(count: int) -> tuple[float, float]:
    """Return the seconds that two processes take to sum one number, and `count` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "exchange.py"
        script.write_text(EXCHANGE)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        small, large = json.loads(
            _run([*launch, str(script), str(count)], {"OMP_NUM_THREADS": "1"}).splitlines()[-1]
        )
    return small, large


def _run(command: list[str], more: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
