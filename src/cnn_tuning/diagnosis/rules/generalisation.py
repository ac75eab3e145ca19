"""Rules on training against validation after each epoch: learnt by heart, too long, or too little."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cnn_tuning.diagnosis.findings import Finding, fired, not_evaluated, ok
from cnn_tuning.diagnosis.recording import Recording
from cnn_tuning.diagnosis.rules.course import Values, course_of, creeps, exploded_at, mean_of, unfinished
from cnn_tuning.diagnosis.rules.remedy import Patch, loosened, rate_of, regularised, rounded, suggested_rate

CONFIDENCE = 0.95
# A gap is looked at after each epoch: at 95 %, one of many looks would find one by chance.
GAP_CONFIDENCE = 0.99
# A gap that is uncertain by more than so many times what is looked for is unknown: of 50 images, not of 144.
BLUNT = 15
# An epoch whose validation loss is above the lowest by no more is as good.
AS_GOOD = 0.05
# Losses that differ by less show no gap, whatever a few images' accuracies do.
APART = 0.1
# The training loss fell, if it lost this share: what was learnt meanwhile did not generalise.
LEARNT = 0.2
MOST_IMAGES = 20_000
# A training that ended too early after fewer updates, of batches so large, is helped by smaller ones.
FEW_UPDATES, LARGE_BATCH = 500, 256


@dataclass(frozen=True)
class Epochs:
    """Measured epochs in which all is finite; `images`: of the validation split, `train_images` measured."""

    step: Values
    train_loss: Values
    train_accuracy: Values
    val_loss: Values
    val_accuracy: Values
    images: int
    train_images: int


def epochs_of(recording: Recording) -> Epochs:
    """Return the epochs to judge."""
    curves = recording.curves
    names = ("epoch_step", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    rows = np.array([getattr(curves, name) for name in names], np.float64)
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    images = len(recording.data.labels) if recording.data is not None else least_images(rows[4])
    wanted = recording.recipe["trainer.train_eval_samples"] or images
    known = int(recording.data.counts.sum()) if recording.data is not None else wanted
    return Epochs(
        step=rows[0],
        train_loss=rows[1],
        train_accuracy=rows[2],
        val_loss=rows[3],
        val_accuracy=rows[4],
        images=images,
        train_images=min(int(wanted), known),
    )


def least_images(accuracies: Values) -> int:
    """Return the least number of images that can give these accuracies: fewer than there are, if not the same.

    While a training goes on, nothing else tells how exact its accuracies are.
    """
    if len(accuracies) == 0:
        return 0
    count = np.arange(1, MOST_IMAGES + 1)
    hits = accuracies[:, None] * count
    fits = (np.abs(hits - np.rint(hits)) < 1e-6 + 2e-7 * count).all(axis=0)
    return int(count[fits.argmax()]) if fits.any() else MOST_IMAGES


def accuracy_gap(train: float, train_images: int, val: float, val_images: int) -> tuple[float, float]:
    """Return the gap and its lower one-sided 99 % bound (Newcombe, Statistics in Medicine 17, 1998, 873-890)."""
    low = bounds(train, train_images, GAP_CONFIDENCE)[0]
    high = bounds(val, val_images, GAP_CONFIDENCE)[1]
    return train - val, train - val - math.hypot(train - low, high - val)


def bounds(share: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's bounds of a share of `count`, each of which holds with the confidence."""
    from scipy.stats import binomtest

    if count < 1:
        return 0.0, 1.0
    interval = binomtest(round(share * count), count).proportion_ci(2 * confidence - 1, method="wilson")
    return min(float(interval.low), share), max(float(interval.high), share)


def overfitting(recording: Recording, *, gap: float, rise: float) -> Finding:
    """Validation falls behind training: in accuracy, or in loss with the validation loss past its turn."""
    rule, epochs = "overfitting", epochs_of(recording)
    count = len(epochs.step)
    if count < 2:
        return not_evaluated(rule, f"{count} epochs were measured, 2 are needed")
    wide, surely = accuracy_gap(
        epochs.train_accuracy[-1], epochs.train_images, epochs.val_accuracy[-1], epochs.images
    )
    best = int(epochs.val_loss.argmin())
    now = float(epochs.val_loss[-2:].mean())
    risen = now / max(float(epochs.val_loss[best]), 1e-12) - 1
    turned = risen > rise and epochs.train_loss[-1] < (1 - LEARNT) * epochs.train_loss[best]
    evidence = {
        "gap": wide,
        "gap at least": surely,
        "train accuracy": float(epochs.train_accuracy[-1]),
        "val accuracy": float(epochs.val_accuracy[-1]),
        "val loss risen": risen,
        "lowest val loss at epoch": best + 1,
        "val images": epochs.images,
    }
    told = f"{epochs.train_accuracy[-1]:.2%} on training and {epochs.val_accuracy[-1]:.2%} on validation images"
    apart = epochs.val_loss[-1] > (1 + APART) * epochs.train_loss[-1]
    sure = apart and surely > (0 if turned else gap)
    if apart and not sure and wide > gap and wide - surely > BLUNT * gap:
        reason = f"{told}, which may be chance: {epochs.images:,} images are too few to tell"
        return not_evaluated(rule, reason, evidence)
    if not sure:
        return ok(rule, f"{told}: a gap of {100 * wide:.2f} points, surely {100 * max(surely, 0):.2f}", evidence)
    remedy, action = regularised(recording.recipe)
    loss = f"; the validation loss is {risen:.0%} above that of epoch {best + 1}" if turned else ""
    return fired(
        rule,
        f"{told}: a gap of {100 * wide:.2f} points, at least {100 * surely:.2f} (99 %){loss}",
        evidence=evidence,
        advice=f"{action}, or learn from more images",
        remedy=remedy,
        first_step=int(epochs.step[best]) if turned else _first_wide(epochs, gap),
    )


def _first_wide(epochs: Epochs, gap: float) -> int:
    for i, (train, val) in enumerate(zip(epochs.train_accuracy, epochs.val_accuracy, strict=True)):
        if accuracy_gap(train, epochs.train_images, val, epochs.images)[1] > gap:
            return int(epochs.step[i])
    return int(epochs.step[-1])


def overtraining(recording: Recording, *, share: float, epochs: float) -> Finding:
    """The training went on long after validation was at its best: it should have stopped."""
    rule, seen = "overtraining", epochs_of(recording)
    count = len(seen.step)
    if count <= epochs:
        return not_evaluated(rule, f"{count} epochs were measured, {epochs + 1:.0f} are needed")
    best = max(_best_loss(seen), _best_accuracy(seen))
    wasted = count - 1 - best
    risen = float(seen.val_loss[-1] / max(seen.val_loss[best], 1e-12)) - 1
    fallen = 1 - float(seen.train_loss[-1] / max(seen.train_loss[best], 1e-12))
    evidence = {"best epoch": best + 1, "epochs": count, "val loss since": risen, "train loss since": -fallen}
    if wasted < max(epochs, share * count):
        return ok(rule, f"validation was at its best in epoch {best + 1} of {count}", evidence)
    if risen < 0:
        return ok(rule, f"the validation loss still fell after epoch {best + 1} of {count}", evidence)
    if fallen < LEARNT:
        return ok(rule, f"after epoch {best + 1} of {count} neither validation nor training went on", evidence)
    return fired(
        rule,
        f"validation was at its best in epoch {best + 1} of {count}; since then the training loss changed by "
        f"{-fallen:+.0%}, the validation loss by {risen:+.0%}",
        evidence=evidence,
        advice=f"stop after epoch {best + 1}: the {wasted} epochs since then gained nothing",
        remedy=_stopped(recording, best + 1, wasted),
        first_step=int(seen.step[best]),
    )


def _best_loss(seen: Epochs) -> int:
    """Return the first epoch whose validation loss is as good as the lowest."""
    return int(np.argmax(seen.val_loss <= (1 + AS_GOOD) * seen.val_loss.min()))


def _best_accuracy(seen: Epochs) -> int:
    """Return the first epoch within one standard error of the best validation accuracy (Breiman et al. 1984)."""
    top = float(seen.val_accuracy.max())
    error = math.sqrt(top * (1 - top) / max(seen.images, 1))
    return int(np.argmax(seen.val_accuracy >= top - error))


def _stopped(recording: Recording, epoch: int, wasted: int) -> Patch:
    """Return a patch that stops in time; a schedule that anneals must end there, not be cut off."""
    if recording.recipe["schedule.name"] in ("one_cycle", "cosine"):
        return {"trainer.max_epochs": epoch}
    return {
        "trainer.early_stopping": {"patience": max(1, wasted // 2), "min_delta": 0.0},
        "trainer.monitor": "val/loss",
    }


def underfitting(recording: Recording, *, accuracy: float, learnt: float, falling: float) -> Finding:
    """The training images themselves are not learnt, or both losses still fell fast when the training ended."""
    rule, seen, curves = "underfitting", epochs_of(recording), recording.curves
    reason = unfinished(recording)
    if reason:
        return not_evaluated(rule, reason)
    if len(seen.step) == 0:
        return not_evaluated(rule, "no epoch was measured")
    reached = float(seen.train_accuracy[-1])
    at_most = bounds(reached, seen.train_images)[1]
    several = len(seen.step) > 1
    fall, since = (_last_fall(seen), "epoch") if several else (_fall_within(recording), "half of its steps")
    annealed = bool(curves.learning_rate[-1] < 0.1 * np.nanmax(curves.learning_rate))
    fast = fall > falling * (1 if several else 2) and at_most < learnt and not annealed
    updates = len(curves.loss)
    evidence = {
        "train accuracy": reached,
        "at most": at_most,
        "updates": updates,
        f"loss fell in the last {since} by": fall,
    }
    if reached < accuracy <= at_most and not fast:
        told = f"{reached:.2%} of {seen.train_images:,} training images are learnt"
        return not_evaluated(rule, f"{told}: too few to tell that from {accuracy:.0%}", evidence)
    if at_most >= accuracy and not fast:
        return ok(rule, f"{reached:.2%} of the training images are learnt", evidence)
    if at_most < accuracy:
        text = f"only {reached:.2%} of the training images are learnt"
    else:
        text = f"the training ended too early, after {updates:,} updates"
    if fast:
        text += f"; the loss still fell by {fall:.0%} in the last {since}"
    remedy, advice = _learns_more(recording, fall > falling / 3)
    return fired(rule, text, evidence=evidence, advice=advice, remedy=remedy, first_step=int(seen.step[-1]))


def _last_fall(seen: Epochs) -> float:
    """Return by which share both losses are at least below all of before; 0 where one is not."""
    if len(seen.step) < 2:
        return 0.0
    falls = [1 - loss[-1] / max(loss[:-1].min(), 1e-12) for loss in (seen.train_loss, seen.val_loss)]
    return max(0.0, float(min(falls)))


def _fall_within(recording: Recording) -> float:
    """Return by which share, at least, the last quarter's step losses are below the second's."""
    course = course_of(recording)
    if isinstance(course, str):
        return 0.0
    quarters = np.array_split(course.loss, 4)
    (before, error), (after, other) = mean_of(quarters[1]), mean_of(quarters[3])
    return max(0.0, 1 - (after + other) / max(before - error, 1e-12))


def _learns_more(recording: Recording, improving: bool) -> tuple[Patch, str]:
    epochs, batch = int(recording.recipe["trainer.max_epochs"]), int(recording.recipe["trainer.batch_size"])
    course, looser, rate = course_of(recording), loosened(recording.recipe), rate_of(recording)
    if not isinstance(course, str) and exploded_at(course, 2.0) is not None:
        return {"optimizer.learning_rate": rounded(rate / 10)}, "lower the learning rate"
    if not isinstance(course, str) and creeps(course):
        return {
            "optimizer.learning_rate": rounded(suggested_rate(recording) or rate * 10)
        }, "raise the learning rate"
    if improving and len(recording.curves.loss) < FEW_UPDATES and batch >= LARGE_BATCH:
        return {"trainer.batch_size": batch // 8}, "take smaller batches: more updates of as many images"
    if improving or len(recording.curves.epoch_step) == 1:
        return {"trainer.max_epochs": 2 * epochs}, "train longer"
    if looser:
        return looser, "take regularisation away"
    return {"trainer.max_epochs": 2 * epochs}, "take a larger network (model.arguments), or train longer"
