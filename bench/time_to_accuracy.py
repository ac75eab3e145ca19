"""Time to a mean test accuracy of 99.23 % on MNIST: ours against the lab recipe in Keras and in plain PyTorch.

    python bench/time_to_accuracy.py [--seeds 5] [--epochs 10]

Seconds are of training only, for all alike: imports, data and measuring between epochs do not count. Ours is
the experiment `mnist_fast`, with as few epochs as bring the mean over the seeds to the target. The peers run
the lab recipe (batch 32, Adam 1e-3, all 60,000 images, with the lab's dropout) in this run until their test
accuracy first reaches the target, or to the end of its epochs. Then: samples/s of the same lab network in
all three. Keras has an environment of its own, made on first use from `peers/keras-requirements.lock`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import test_accuracy
from workplace import FOLDER, ROOT, machine, prepared, trained

PEERS = Path(__file__).parent / "peers"
TARGET = 0.9923
MOST_EPOCHS = 4


def main() -> None:
    """Measure all three and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="trainings of ours")
    parser.add_argument("--epochs", type=int, default=10, help="of the peers at most")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of samples/s")
    parser.add_argument("--only-rates", action="store_true", help="leave out the time to accuracy")
    options = parser.parse_args()
    print(machine(), flush=True)
    folder = prepared("mnist_fast")
    data = _npz(folder)
    keras_python = _keras()

    if not options.only_rates:
        _time_to_accuracy(folder, data, keras_python, options)
    _rates(folder, data, keras_python, options.rounds)


def _time_to_accuracy(folder: Path, data: Path, keras_python: str, options: argparse.Namespace) -> None:
    seconds, accuracies = _ours(folder, options.seeds)
    keras = _peer(keras_python, "keras_lab.py", data, options.epochs)
    torch_loop = _peer(sys.executable, "torch_lab.py", data, options.epochs)
    ours = statistics.mean(seconds)
    print(f"\nours         {ours:7.1f} s to {_spread(accuracies)} (mean of {len(seconds)} seeds)")
    for name, lines in (("Keras, lab", keras), ("PyTorch, lab", torch_loop)):
        last = lines[-1]
        reached = "reached" if last["test_accuracy"] >= TARGET else f"best {_best(lines):.2%}, not reached"
        print(
            f"{name:<12} {last['train_seconds']:7.1f} s to {TARGET:.2%}: {reached} after {last['epoch']} epochs; "
            f"ratio to ours {last['train_seconds'] / ours:.0f}×"
        )


def _rates(folder: Path, data: Path, keras_python: str, rounds: int) -> None:
    """Compare one epoch of the lab network with dropout, one after the other in each round."""
    ratios: dict[str, list[float]] = {"Keras": [], "PyTorch loop": []}
    print("\nsamples/s of the lab network with dropout, batch 32, one epoch a round:", flush=True)
    for turn in range(rounds):
        lab = trained(folder, FOLDER / "lab", "experiment=lab", "model.dropout=both", "trainer.max_epochs=1")
        ours = lab["samples_per_second"]
        keras = _peer(keras_python, "keras_lab.py", data, 1)[0]["samples_per_second"]
        loop = _peer(sys.executable, "torch_lab.py", data, 1)[0]["samples_per_second"]
        ratios["Keras"].append(ours / keras)
        ratios["PyTorch loop"].append(ours / loop)
        print(f"  round {turn + 1}: ours {ours:,.0f}, Keras {keras:,.0f}, PyTorch loop {loop:,.0f}", flush=True)
    for name, values in ratios.items():
        print(f"  ours to {name}: {statistics.median(values):.2f}× (median)")


def _ours(folder: Path, seeds: int) -> tuple[list[float], list[float]]:
    """Train with each seed, with the fewest epochs that bring the mean to the target."""
    seconds: list[float] = []
    accuracies: list[float] = []
    for epochs in range(1, MOST_EPOCHS + 1):
        seconds, accuracies = [], []
        for seed in range(seeds):
            out = FOLDER / f"fast-{epochs}-{seed}"
            facts = trained(folder, out, "experiment=mnist_fast", f"seed={seed}", f"trainer.max_epochs={epochs}")
            seconds.append(facts["seconds"]["train"])
            accuracies.append(test_accuracy(folder, out))
            print(f"  ours: {epochs} epochs, seed {seed}: {seconds[-1]:.2f} s, {accuracies[-1]:.2%}", flush=True)
        if statistics.mean(accuracies) >= TARGET:
            break
    return seconds, accuracies


def _npz(folder: Path) -> Path:
    """Write the official splits, validation images back among the training images, as the peers read them."""
    from cnn_tuning.data.packed import PackedData

    path = FOLDER / "mnist.npz"
    if not path.exists():
        data = PackedData.open(folder / "data/prepared")
        train, val, test = (data.split(name) for name in ("train", "val", "test"))
        np.savez(
            path,
            train_images=np.concatenate([train.images, val.images])[:, 0],
            train_labels=np.concatenate([train.labels, val.labels]),
            test_images=np.asarray(test.images)[:, 0],
            test_labels=test.labels,
        )
    return path


def _keras() -> str:
    python = FOLDER / "keras-venv/bin/python"
    if not python.exists():
        uv = str(Path(sys.executable).parent / "uv")
        lock = str(PEERS / "keras-requirements.lock")
        subprocess.run([uv, "venv", "--quiet", str(python.parents[1])], check=True)
        subprocess.run(
            [uv, "pip", "sync", "--quiet", "--python", str(python), "--require-hashes", lock], check=True
        )
    return str(python)


def _peer(python: str, script: str, data: Path, epochs: int) -> list[dict[str, Any]]:
    command = [python, str(PEERS / script), "--data", str(data), "--epochs", str(epochs), "--dropout"]
    command += ["--target", str(TARGET)]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("{"):
                lines.append(json.loads(text))
                print(f"  {script}: {text.strip()}", flush=True)
    if process.returncode or not lines:
        sys.exit(f"{script} ended with {process.returncode}")
    return lines


def _best(lines: list[dict[str, Any]]) -> float:
    return max(line["test_accuracy"] for line in lines)


def _spread(accuracies: list[float]) -> str:
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{statistics.mean(accuracies):.2%} ± {deviation:.2%}"


if __name__ == "__main__":
    main()
