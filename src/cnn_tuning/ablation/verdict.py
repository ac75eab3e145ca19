"""What a comparison shows, in plain words: results and `Comparison`s come in, a sentence for each goes out.

Intervals are over seeds (would another training show it?), McNemar's test is over images (would other images
show it for these networks?). An effect is stated as found only where its interval rules zero out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cnn_tuning.ablation.compare import Comparison, Difference, Images, Result, by_arm
from cnn_tuning.statistics import MOST_SEEDS, Estimate

ACCURACY, GAP = "accuracy", "the generalisation gap"
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Sentence:
    """One conclusion: of a difference that chance is ruled out for (`clear`) or not (`open`), or of a failure."""

    text: str
    kind: Literal["clear", "open", "failed"]


def sentences(
    results: Sequence[Result], comparisons: Sequence[Comparison], *, in_parts: bool = False
) -> list[Sentence]:
    """Return what is to be said of arms that failed, of arms that are not alike, then of each comparison.

    `in_parts`: arms learn the data part by part (`trainer.sequential_parts`).
    """
    lost = {arm for arm, own in by_arm(results).items() if all(r.right is None for r in own)}
    found = [Sentence(text, "failed") for text in failures(results)]
    found += [Sentence(text, "open") for text in [*mixed(results), *halved(results), *chosen(results, in_parts)]]
    met = [c for c in comparisons if not {c.arm, c.reference} & lost]
    found += [Sentence(verdict(c), "clear" if c.is_clear else "open") for c in met]
    return found if met else [*found, Sentence("There is nothing to compare.", "failed")]


def failures(results: Sequence[Result]) -> list[str]:
    """Return a sentence for each arm of which a training failed."""
    found = []
    for arm, own in by_arm(results).items():
        failed = [r for r in own if r.right is None]
        if not failed:
            continue
        if len(failed) < len(own):
            how_often = f"{len(failed)} of {len(own)} seeds"
        else:
            how_often = f"any of {len(own)} seeds" if len(own) > 1 else "its only seed"
        reason = failed[0].failure.strip().rstrip(".") or "no reason is known"
        found.append(f"{arm} did not finish with {how_often}: {reason}.")
    return found


def mixed(results: Sequence[Result]) -> list[str]:
    """Return a sentence where the trainings that are compared were not all made on the same kind of device."""
    counts = Counter(r.made_on for r in results if r.made_on)
    if len(counts) < 2:
        return []
    made = ", ".join(f"{count} on {place}" for place, count in counts.most_common())
    return [f"The trainings were made on different devices ({made}): a difference between arms may come of that."]


def halved(results: Sequence[Result]) -> list[str]:
    """Return a sentence for each arm of which a training had a smaller batch than the arm's."""
    found = []
    for arm, own in by_arm(results).items():
        sizes = Counter(r.smaller_batch for r in own if r.smaller_batch)
        if sizes:
            made = ", ".join(f"{size} ({count} of {len(own)} trainings)" for size, count in sizes.items())
            found.append(f"{arm} was trained with batch size {made}: memory did not suffice for its own.")
    return found


def chosen(results: Sequence[Result], in_parts: bool) -> list[str]:
    """Return a sentence where judging each training by its best epoch favours some arms."""
    done = {arm: own for arm, all_ in by_arm(results).items() if (own := [r for r in all_ if r.right is not None])}
    epochs = {r.epochs for own in done.values() for r in own}
    why = ["the best of more epochs is better by chance alone"] if len(epochs) > 1 else []
    why += ["what was forgotten after it does not show"] if in_parts and done else []
    if not why:
        return []
    last = {arm: sum(r.last_val_accuracy for r in own) / len(own) for arm, own in done.items()}
    known = ", ".join(f"{arm} {100 * value:.2f} %" for arm, value in last.items() if not math.isnan(value))
    return [
        "Accuracy is of each training's best epoch, chosen by the images that judge it: "
        f"{', and '.join(why)}.{f' After the last epoch: {known}.' if known else ''}"
    ]


def verdict(comparison: Comparison) -> str:
    """Return what can be concluded, and from what."""
    c = comparison
    if not c.seeds:
        return f"{c.arm} cannot be compared with {c.reference}: no seed finished with both."
    over = _over_images(c.images, c.significance, several=len(c.seeds) > 1)
    if len(c.seeds) == 1:
        effects = _effects([(c.accuracy, ACCURACY), (c.gap, GAP)])
        return f"{c.arm} {effects} against {c.reference}, but {_with(c)}: another may show otherwise; {over}."
    return "; ".join(filter(None, (_over_seeds(c), _of_loss(c.loss_gap), over))) + "."


def _over_seeds(c: Comparison) -> str:
    both = [(c.accuracy, ACCURACY), (c.gap, GAP)]
    open_ones = [(d, what) for d, what in both if not _is_settled(d)]
    settled = _effects([(d, what) for d, what in both if _is_settled(d)])
    if not open_ones:
        return f"{c.arm} {settled} against {c.reference} {_with(c)}"
    start = f"{c.arm} {settled} against {c.reference}; " if settled else f"{c.arm} against {c.reference}: "
    same = [f"{_noun(d, what)}, {_figures(d)}, is the same {_with(c)}" for d, what in open_ones if not d.interval]
    chance = [(d, what) for d, what in open_ones if d.interval]
    parts = [f"{text}, so its spread is unknown and nothing is claimed" for text in same]
    if len(chance) == 2:
        one, other = (f"{_noun(d, what)}, {_figures(d)}," for d, what in chance)
        parts.append(f"neither {one} nor {other} is distinguishable from chance {_with(c)}")
    elif chance:
        ((d, what),) = chance
        parts.append(f"{_noun(d, what)}, {_figures(d)}, is not distinguishable from chance {_with(c)}")
    if chance:
        parts.append(_settling([d.seeds_to_settle for d, _ in chance]))
    return start + "; ".join(parts)


def _of_loss(d: Difference | None) -> str:
    """Return what is found of the gap in loss, if anything is."""
    if d is None or d.interval is None or not d.is_clear:
        return ""
    low, high = sorted((abs(d.interval.low), abs(d.interval.high)))
    digits = max(3, 1 - math.floor(math.log10(low)))
    figures = f"{abs(d.value):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"it {'raises' if d.value > 0 else 'lowers'} the gap in loss by {figures}"


def _is_settled(d: Difference) -> bool:
    return d.is_clear or max(map(abs, d.by_seed)) < _ROUNDING


def _effects(differences: Sequence[tuple[Difference, str]]) -> str:
    if len(differences) == 2 and all(abs(d.value) < _ROUNDING for d, _ in differences):
        return f"makes no difference to {ACCURACY} or {GAP}"
    return " and ".join(_effect(d, what) for d, what in differences)


def _effect(d: Difference, what: str) -> str:
    """Return a statement of an effect, such as `gains 0.20 points of accuracy [0.10, 0.30]`."""
    if abs(d.value) < _ROUNDING:
        return f"makes no difference to {what}"
    rises = d.value > 0
    value, interval = _numbers(d)
    if what == ACCURACY:
        return f"{'gains' if rises else 'costs'} {value} points of accuracy{interval}"
    return f"{'raises' if rises else 'lowers'} the generalisation gap by {value} points{interval}"


def _noun(d: Difference, what: str) -> str:
    if not float(_numbers(d)[0]):
        return f"its difference in {what}"
    if what == ACCURACY:
        return f"its {'gain' if d.value > 0 else 'loss'} in accuracy"
    return f"its {'increase' if d.value > 0 else 'reduction'} of the generalisation gap"


def _figures(d: Difference) -> str:
    value, interval = _numbers(d)
    return f"{value} points{interval}"


def _numbers(d: Difference) -> tuple[str, str]:
    """Return a size and its interval in percentage points, both in the direction of the effect."""
    sign = -1 if d.value < 0 else 1
    if d.interval is None:
        return points(Estimate(sign * d.value, 0.0, 0.0))[0], ""
    low, high = sorted((sign * d.interval.low, sign * d.interval.high))
    value, low_text, high_text = points(Estimate(sign * d.value, low, high))
    return value, f" [{low_text}, {high_text}]"


def points(e: Estimate, *, signed: bool = False) -> tuple[str, str, str]:
    """Return value and bounds in percentage points, with digits enough that no bound seems to be zero."""
    for digits in range(2, 9):
        texts = [_percent(x, digits, signed=signed) for x in (e.value, e.low, e.high)]
        if all(float(text) or not x for text, x in zip(texts[1:], (e.low, e.high), strict=True)):
            break
    value, low, high = texts
    return value, low, high


def _percent(share: float, digits: int, *, signed: bool = False) -> str:
    text = f"{100 * share:{'+' if signed else ''}.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def _with(c: Comparison) -> str:
    count = len(c.seeds)
    if count < c.planned:
        return f"with the {f'{count} seeds' if count > 1 else 'one seed'} of {c.planned} that both finished"
    return f"with {count} seeds" if count > 1 else "with one seed only"


def _settling(needed: Sequence[int | None]) -> str:
    amounts = [amount(n) for n in needed]
    if len(set(amounts)) > 1:
        return f"settling the accuracy would take {amounts[0]} seeds, the gap {amounts[1]}"
    what = "it" if len(needed) == 1 else "both"
    return (
        f"{amounts[0]} seeds would settle {what}"
        if needed[0]
        else f"settling {what} would take {amounts[0]} seeds"
    )


def amount(seeds: int | None) -> str:
    """Return a number of seeds as exactly as it deserves, which is not very; None is more than MOST_SEEDS."""
    if seeds is None:
        return f"more than {MOST_SEEDS:,}"
    step = 1 if seeds <= 10 else 5 * 10 ** (len(str(seeds)) - 2)
    return f"about {-(-seeds // step) * step:,}"


def _over_images(images: Images, significance: float, *, several: bool) -> str:
    if not images.won + images.lost:
        return "no image tells these networks apart" if several else "both are right on the same images"
    drawn = f"McNemar: images won {images.won:,}, lost {images.lost:,}, p {p_text(images.p, significance)}"
    differ = "would likely differ too" if images.p < significance else "need not differ"
    return f"on other images these networks {differ} ({drawn})"


def p_text(p: float, significance: float) -> str:
    """Return a p value such as `= 0.03`."""
    if p < 0.0001:
        return "< 0.0001"
    # As many digits as show on which side of the level it is.
    texts = (f"{p:.{digits}g}" for digits in range(2, 9))
    return "= " + next((t for t in texts if (float(t) < significance) == (p < significance)), f"{p:.9g}")
