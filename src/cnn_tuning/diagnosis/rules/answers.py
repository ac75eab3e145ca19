"""Rules on the best network's answers to the validation split: weak classes, confused ones, suspected labels."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Data, Recording
from cnn_tuning.diagnosis.rules.data import NO_DATA, SHOWN, compared_images, listed
from cnn_tuning.diagnosis.rules.generalisation import bounds
from cnn_tuning.diagnosis.rules.remedy import Patch

# Of fewer images of a class nothing is told.
FEWEST_IMAGES = 10
# The least gain over always answering with the commonest class, as a share of what can be gained: below it the
# answers tell of the training, not of the data.
GAIN = 0.4
UNLEARNT = "the network has not learnt enough: its answers tell of the training, not of the data"


def low_recall(recording: Recording, *, recall: float) -> Finding:
    """Of the images of some class, surely less than the floor are found."""
    rule, data = "low_recall", recording.data
    if data is None or not _answered(data):
        return not_evaluated(rule, NO_DATA)
    if not _learnt(data):
        return not_evaluated(rule, UNLEARNT)
    table = confusion(data)
    images = table.sum(axis=1)
    judged = np.flatnonzero(images >= FEWEST_IMAGES)
    if not len(judged):
        return not_evaluated(rule, f"no class has {FEWEST_IMAGES} validation images")
    found = {int(c): table[c, c] / images[c] for c in judged}
    highest = {c: bounds(share, int(images[c]))[1] for c, share in found.items()}
    low = sorted((c for c in found if highest[c] < recall), key=lambda c: found[c])
    least = min(found, key=lambda c: found[c])
    evidence = {
        "recall": {data.classes[c]: share for c, share in found.items()},
        "too few images": _few(data, images),
        "classes": [data.classes[c] for c in low],
    }
    told = f"{found[least]:.1%} of {images[least]:,} images of {data.classes[least]!r} are found"
    if not low and _mostly_few(images):
        return not_evaluated(rule, f"{_told_few(images)}; {told}", evidence)
    if not low:
        return ok(rule, f"{told}, the least of all classes", evidence)
    return fired(
        rule,
        f"{told}, at most {highest[least]:.1%} (95 %); below {recall:.0%} {'is' if len(low) == 1 else 'are'} "
        f"{len(low)} of {len(found)} classes",
        evidence=evidence,
        advice=f"look at the labels of {listed([data.classes[c] for c in low])}, and collect more images of them",
    )


def confused_pairs(recording: Recording, *, share: float, images: float) -> Finding:
    """Surely more than a share of one class's images are taken for one and the same other class."""
    rule, data = "confused_pairs", recording.data
    if data is None or not _answered(data) or len(data.classes) < 2:
        return not_evaluated(rule, NO_DATA)
    if not _learnt(data):
        return not_evaluated(rule, UNLEARNT)
    table = confusion(data)
    totals = table.sum(axis=1)
    if totals.max() < max(images, FEWEST_IMAGES):
        return not_evaluated(rule, f"no class has {max(images, FEWEST_IMAGES):.0f} validation images")
    wrong = table - np.diag(np.diag(table))
    rates = wrong / np.maximum(totals, 1)[:, None]
    pairs = [
        (int(a), int(b))
        for a, b in np.argwhere((wrong >= images) & (rates > share))
        if bounds(rates[a, b], int(totals[a]))[0] > share
    ]
    pairs.sort(key=lambda pair: -rates[pair])
    a, b = pairs[0] if pairs else (int(i) for i in np.unravel_index(rates.argmax(), rates.shape))
    told = (
        f"{wrong[a, b]} of {totals[a]:,} images of {data.classes[a]!r} ({rates[a, b]:.1%}) are taken for "
        f"{data.classes[b]!r}"
    )
    shown = [
        {"class": data.classes[x], "taken for": data.classes[y], "images": int(wrong[x, y]), "share": rates[x, y]}
        for x, y in pairs[:SHOWN]
    ]
    evidence = {"pairs": shown, "worst share": float(rates[a, b]), "too few images": _few(data, totals)}
    if not pairs and _mostly_few(totals):
        return not_evaluated(rule, f"{_told_few(totals)}; {told}", evidence)
    if not pairs:
        return ok(rule, told if wrong.any() else "no validation image is taken for another class", evidence)
    more = f"; {len(pairs)} pairs in all" if len(pairs) > 1 else ""
    return fired(
        rule,
        f"{told}, surely more than {share:.0%}{more}",
        evidence=evidence,
        advice=f"look at images and labels of {data.classes[a]!r} and {data.classes[b]!r}, add such images, or "
        "join the classes",
    )


def label_errors(recording: Recording, *, share: float, images: float, gain: float) -> Finding:
    """The network surely contradicts validation labels, or equal training images differ in theirs."""
    rule, data = "label_errors", recording.data
    if data is None or not _answered(data):
        return not_evaluated(rule, NO_DATA)
    conflicting, trained = data.conflicting, max(compared_images(data), 1)
    contradicted = conflicting >= images and conflicting / trained > share
    present = np.unique(data.labels)
    judged = len(present) > 1 and _learnt(data, gain)
    if not judged and not contradicted:
        return not_evaluated(rule, UNLEARNT if len(present) > 1 else "the validation split holds one class")
    suspects = _suspects(data, present) if judged else np.empty(0, np.int64)
    lowest = bounds(len(suspects) / len(data.labels), len(data.labels))[0]
    evidence = {
        "suspected": len(suspects),
        "share": len(suspects) / len(data.labels),
        "share at least": lowest,
        "conflicting training images": conflicting,
        "positions": suspects[:SHOWN].tolist(),
        "labels": [data.classes[data.labels[i]] for i in suspects[:SHOWN]],
        "answers": [data.classes[data.probabilities[i].argmax()] for i in suspects[:SHOWN]],
    }
    many = len(suspects) >= images and lowest > share
    told = f"{len(suspects)} of {len(data.labels):,} validation labels ({evidence['share']:.2%}) are suspected"
    if not many and not contradicted:
        return ok(rule, told, evidence)
    if contradicted:
        told += f"; {conflicting:,} of {trained:,} training images equal one with another label"
    return fired(
        rule,
        told,
        evidence=evidence,
        advice="look at the images at these positions and correct their labels; until then smooth labels",
        remedy=_smoothed(recording),
    )


def confusion(data: Data) -> NDArray[np.int64]:
    """Return how many images of each class (row) are taken for which (column)."""
    count = len(data.classes)
    answers = data.probabilities.argmax(axis=1)
    return np.bincount(data.labels * count + answers, minlength=count * count).reshape(count, count)


def _few(data: Data, images: NDArray[np.int64]) -> list[str]:
    """Return the classes of which nothing is told."""
    return [data.classes[c] for c in np.flatnonzero(images < FEWEST_IMAGES)]


def _mostly_few(images: NDArray[np.int64]) -> bool:
    """Return whether most classes have too few images: that the others do well says little."""
    return bool((images < FEWEST_IMAGES).mean() > 0.5)


def _told_few(images: NDArray[np.int64]) -> str:
    enough = int((images >= FEWEST_IMAGES).sum())
    return f"{enough} of {len(images)} classes have {FEWEST_IMAGES} validation images"


def _answered(data: Data) -> bool:
    return (
        len(data.labels) > 0
        and len(data.probabilities) == len(data.labels)
        and bool(np.isfinite(data.probabilities).all())
    )


def _learnt(data: Data, gain: float = GAIN) -> bool:
    """Return whether the network is so much better than the commonest class that its answers tell of the data."""
    commonest = np.bincount(data.labels).max() / len(data.labels)
    right = (data.probabilities.argmax(axis=1) == data.labels).mean()
    return bool(right - commonest >= gain * (1 - commonest)) and commonest < 1


def _suspects(data: Data, present: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return positions that confident learning suspects, the most suspicious first (Northcutt et al. 2021).

    Those that both its ways of counting prune, of the classes that have labels.
    """
    from cleanlab.filter import find_label_issues

    chances = data.probabilities[:, present].astype(np.float64)
    chances = chances / np.maximum(chances.sum(axis=1, keepdims=True), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find_label_issues(
            np.searchsorted(present, data.labels),
            chances,
            filter_by="both",
            return_indices_ranked_by="self_confidence",
            n_jobs=1,
        )
    return np.asarray(found, np.int64)


def _smoothed(recording: Recording) -> Patch:
    smoothing = float(recording.recipe["trainer.label_smoothing"])
    return {} if smoothing >= 0.1 else {"trainer.label_smoothing": 0.1}
