"""Synthetic ablations: arms × seeds × images with hard and easy images, and seeds that train better or worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cnn_tuning.ablation.outcome import Result

NAN = float("nan")


def study(
    rng: np.random.Generator,
    effects: Mapping[str, float],
    *,
    seeds: int = 5,
    images: int = 300,
    seed_noise: float = 0.15,
    train_noise: float = 0.01,
    overfit: Mapping[str, float] | None = None,
) -> list[Result]:
    """Return results of arms whose logits are shifted by `effects` and whose training accuracy by `overfit`."""
    arms, difficulty = list(effects), rng.normal(2.0, 1.5, images)
    shifts = np.array(list(effects.values()))[:, None] + rng.normal(0, seed_noise, (len(arms), seeds))
    right = rng.random((len(arms), seeds, images)) < 1 / (1 + np.exp(-difficulty - shifts[..., None]))
    train = 0.97 + rng.normal(0, train_noise, (len(arms), seeds))
    return [
        result(arm, seed, right[i, seed], train[i, seed] + (overfit or {}).get(arm, 0.0))
        for i, arm in enumerate(arms)
        for seed in range(seeds)
    ]


def result(arm: str, seed: int, right: Sequence[bool] | np.ndarray, train_accuracy: float = 0.99) -> Result:
    """Return a training of two epochs with these right answers; the second was no better than the first."""
    given = np.asarray(right, dtype=bool)
    best, last = float(given.mean()), float(given.mean()) - 0.01
    gap = float(train_accuracy) - last
    return Result(
        arm, seed, given, float(train_accuracy), best, 0.1, 10.0, 0.01, 2, 40, gap=gap, last_val_accuracy=last
    )


def failed(arm: str, seed: int, reason: str = "the loss is no longer finite at step 120") -> Result:
    """Return a training that failed."""
    return Result(arm, seed, None, NAN, NAN, NAN, 1.0, 0.001, 0, 0, reason)
