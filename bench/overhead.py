"""What the full stage costs: samples/s of `train` (Lightning, tracking, callbacks) to a bare PyTorch loop.

    python bench/overhead.py [--rounds 3] [--epochs 2] [--experiment mnist]

Both train the same network on the same data on the device with the same optimizer, schedule and
augmentation, one after the other in each round; the ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from workplace import FOLDER, ROOT, machine, prepared, trained

BARE = """
from cnn_tuning.machine import prepare_process; prepare_process()
import os
import json, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from cnn_tuning.config import Recipe, compose, select
from cnn_tuning.data.augment import augment
from cnn_tuning.data.packed import PackedData
from cnn_tuning.models.network import build_network
from cnn_tuning.training.optimisation import build_optimizer, build_schedule

recipe = select(Recipe, compose(sys.argv[2:]))
data = PackedData.open(Path(sys.argv[1]) / "data/prepared")
meta, train = data.meta, data.split("train")
torch.manual_seed(recipe.seed)
torch.set_num_threads(recipe.trainer.threads or len(os.sched_getaffinity(0)))
network = build_network(recipe.model, meta.shape, len(meta.classes), meta.mean, meta.std)
network = network.to(memory_format=torch.channels_last)
images, labels = torch.tensor(train.images), torch.tensor(train.labels)
size = recipe.trainer.batch_size
per_epoch = -(-len(labels) // size)
optimizer = build_optimizer(network, recipe.optimizer, fused=True)
schedule = build_schedule(optimizer, recipe.schedule, recipe.trainer.max_epochs * per_epoch, per_epoch)
generator = torch.Generator().manual_seed(recipe.seed)
network.train()
start = time.monotonic()
for _ in range(recipe.trainer.max_epochs):
    for rows in torch.randperm(len(labels), generator=generator).split(size):
        pixels = augment(images.index_select(0, rows), recipe.augment, generator)
        chosen = labels.index_select(0, rows)
        loss = F.cross_entropy(network(pixels), chosen, label_smoothing=recipe.trainer.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
seconds = time.monotonic() - start
print(json.dumps(recipe.trainer.max_epochs * len(labels) / seconds))
"""


def main() -> None:
    """Measure both in alternation and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--experiment", default="mnist")
    options = parser.parse_args()
    print(machine())
    folder = prepared(options.experiment)
    overrides = [f"experiment={options.experiment}", f"trainer.max_epochs={options.epochs}"]
    ratios = []
    for turn in range(options.rounds):
        bare = _bare(folder, overrides)
        stage = trained(folder, FOLDER / "overhead", *overrides)["samples_per_second"]
        ratios.append(stage / bare)
        print(f"round {turn + 1}: stage {stage:,.0f}, bare loop {bare:,.0f} samples/s, ratio {ratios[-1]:.3f}")
    print(f"ratio of the full stage to a bare loop: {statistics.median(ratios):.3f} (median; target 0.95)")


def _bare(folder: Path, overrides: list[str]) -> float:
    command = [sys.executable, "-c", BARE, str(folder), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
