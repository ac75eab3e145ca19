"""Test accuracy of an experiment over seeds, with its training time: the figures at the head of its YAML.

python bench/accuracy.py mnist --seeds 3
python bench/accuracy.py mnist_fast --seeds 5 trainer.precision=bf16
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
    parser.add_argument("overrides", nargs="*", help="what differs from the experiment")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_intermixed_args()
    print(machine(), flush=True)
    folder = prepared(options.experiment)
    accuracies, seconds = [], []
    for seed in range(options.seeds):
        out = FOLDER / f"{options.experiment}-{seed}"
        facts = trained(folder, out, f"experiment={options.experiment}", f"seed={seed}", *options.overrides)
        seconds.append(facts["seconds"]["train"])
        accuracies.append(test_accuracy(folder, out))
        print(f"  seed {seed}: {accuracies[-1]:.2%}, {seconds[-1]:.1f} s of training", flush=True)
    spread = f" ± {statistics.stdev(accuracies):.2%}" if len(accuracies) > 1 else ""
    name = " ".join((options.experiment, *options.overrides))
    print(f"{name}: {statistics.mean(accuracies):.2%}{spread}, {statistics.mean(seconds):.1f} s")


def test_accuracy(folder: Path, out: Path) -> float:
    """Return the share of test images that a trained model classifies correctly."""
    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.serving.predictor import Predictor

    test = PackedData.open(folder / "data/prepared").split("test")
    answers = Predictor(out / "models/baseline").probabilities(test.images).argmax(1)
    return float((answers == test.labels).mean())


if __name__ == "__main__":
    main()
