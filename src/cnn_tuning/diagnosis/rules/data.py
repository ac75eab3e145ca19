"""Rules on the data: how classes are spread, what the network gets, which images are in both splits."""

from __future__ import annotations

import numpy as np

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Data, Recording

# Positions and names shown; the rest is counted.
SHOWN = 20
NO_DATA = "data and answers were not recorded"


def class_imbalance(recording: Recording, *, ratio: float) -> Finding:
    """The largest class has many times the training images of the smallest."""
    rule, data = "class_imbalance", recording.data
    if data is None or len(data.counts) < 2 or data.counts.sum() == 0:
        return not_evaluated(rule, NO_DATA if data is None else "there is but one class")
    counts = data.counts.astype(np.int64)
    least, most = int(counts.argmin()), int(counts.argmax())
    found = float(counts[most] / counts[least]) if counts[least] else float("inf")
    names = f"{data.classes[most]!r} {counts[most]:,}, {data.classes[least]!r} {counts[least]:,}"
    evidence = {"ratio": found, "counts": dict(zip(data.classes, counts.tolist(), strict=True))}
    if not counts[least]:
        evidence["ratio"] = None
    if found <= ratio:
        return ok(rule, f"the largest class has {found:.2g} times the images of the smallest ({names})", evidence)
    rare = [data.classes[i] for i in np.argsort(counts, kind="stable") if counts[i] * ratio < counts[most]]
    times = f"{found:.3g} times as many" if counts[least] else "images, and none are left for others"
    return fired(
        rule,
        f"{len(rare)} of {len(counts)} classes are rare: {names} training images ({times})",
        evidence={**evidence, "rare classes": rare[:SHOWN]},
        advice=f"collect or repeat images of {listed(rare)}, and judge by recall of each class, not by accuracy",
        first_step=1,
    )


def inputs_not_normalised(recording: Recording, *, mean: float, low: float, high: float) -> Finding:
    """What enters the network is far from mean 0 and standard deviation 1."""
    rule, data = "inputs_not_normalised", recording.data
    if data is None or len(data.input_mean) == 0:
        return not_evaluated(rule, NO_DATA)
    if recording.recipe.get("model.pretrained"):
        return not_evaluated(rule, "a pretrained network gets its pictures as those it was pretrained on")
    means, stds = data.input_mean.astype(np.float64), data.input_std.astype(np.float64)
    if not (np.isfinite(means).all() and np.isfinite(stds).all()):
        return not_evaluated(rule, "the inputs' mean and spread were not measured")
    wrong = (np.abs(means) > mean) | (stds < low) | (stds > high)
    evidence = {"mean": means.tolist(), "standard deviation": stds.tolist()}
    worst = int(np.argmax(wrong)) if wrong.any() else 0
    told = f"channel {worst} has mean {means[worst]:.3g} and standard deviation {stds[worst]:.3g}"
    if not wrong.any():
        return ok(rule, f"inputs are normalised: {told}", evidence)
    return fired(
        rule,
        f"inputs are not normalised: {told}",
        evidence=evidence,
        advice="prepare the data anew (`dvc repro -f preprocess`): mean and spread of its training images differ "
        "from those in meta.json",
        first_step=1,
    )


def leakage(recording: Recording, *, images: float) -> Finding:
    """Equal images are in the training and in the validation split."""
    rule, data = "leakage", recording.data
    if data is None or len(data.labels) == 0:
        return not_evaluated(rule, NO_DATA)
    shared = data.shared.reshape(-1, 2)
    found, compared, trained = len(np.unique(shared[:, 1])), compared_images(data), int(data.counts.sum())
    evidence = {
        "images in both": found,
        "share of validation": found / len(data.labels),
        "training images compared": compared,
        "positions (train, val)": shared[:SHOWN].tolist(),
        "repeated in training": data.repeated,
    }
    if found < images and compared < trained:
        some = f"{found} validation images are" if found else "no validation image is"
        reason = f"{compared:,} of {trained:,} training images were compared: {some} among them"
        return not_evaluated(rule, reason, evidence)
    if found < images:
        some = f"{found} of {len(data.labels):,}" if found else "no"
        return ok(rule, f"{some} validation images are in the training split", evidence)
    return fired(
        rule,
        f"{found:,} of {len(data.labels):,} validation images ({found / len(data.labels):.2%}) are in the "
        "training split, too: validation flatters",
        evidence=evidence,
        advice="remove repeated images from the raw data before it is split",
        first_step=1,
    )


def compared_images(data: Data) -> int:
    """Return how many training images were compared with each other and with the validation split's."""
    return int(data.counts.sum()) if data.compared is None else data.compared


def listed(names: list[str]) -> str:
    """Return names as a person lists them, the first few of many."""
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
