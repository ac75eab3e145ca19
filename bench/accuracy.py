"""Test accuracy of an experiment over seeds, with its training time: the figures at the head of its YAML.

python bench/accuracy.py mnist --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from workplace import FOLDER, machine, prepared, trained


def main() -> None:
    """Train with each seed and print mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(machine(), flush=True)
    folder = prepared(options.experiment)
    accuracies, seconds = [], []
    for seed in range(options.seeds):
        out = FOLDER / f"{options.experiment}-{seed}"
        facts = trained(folder, out, f"experiment={options.experiment}", f"seed={seed}")
        seconds.append(facts["seconds"]["train"])
        accuracies.append(test_accuracy(folder, out))
        print(f"  seed {seed}: {accuracies[-1]:.2%}, {seconds[-1]:.1f} s of training", flush=True)
    spread = f" ± {statistics.stdev(accuracies):.2%}" if len(accuracies) > 1 else ""
    print(f"{options.experiment}: {statistics.mean(accuracies):.2%}{spread}, {statistics.mean(seconds):.1f} s")


def test_accuracy(folder: Path, out: Path) -> float:
    """Return the share of test images that a trained model classifies correctly."""
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.serving.predictor import Predictor

    test = PackedData.open(folder / "data/prepared").split("test")
    answers = Predictor(out / "models/baseline").probabilities(test.images).argmax(1)
    return float((answers == test.labels).mean())


if __name__ == "__main__":
    main()
