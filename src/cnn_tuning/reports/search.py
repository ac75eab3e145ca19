"""The page of a search: a view of it and its pictures in, `report.html` out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnn_tuning.config import SearchConfig, label_of
from cnn_tuning.reports.page import embedded, render
from cnn_tuning.reports.scales import NAMES, dollars, short_names, show, show_gain, show_parameter
from cnn_tuning.reports.search_view import SearchView, Trial

MOST_TRIALS = 200
SAMPLERS = {
    "tpe": "TPE: after {n} random trials, values are drawn from where the better trials lie",
    "gp": "Gaussian process: after {n} random trials, the greatest expected improvement",
    "cmaes": "CMA-ES: after {n} random trials, a normal distribution that moves to the better trials",
    "random": "random values",
    "grid": "every point of the grid",
}
PRUNERS = {
    "none": "every trial runs to its end",
    "median": "a trial ends when it is below the median of the others at the same epoch",
    "hyperband": "Hyperband: of each rung of epochs the best 1/{f} go on, with several lengths of the first rung",
    "asha": "successive halving: of each rung of epochs the best 1/{f} go on",
    "wilcoxon": "a trial ends when its seeds are worse than the best trial's (Wilcoxon's signed-rank test)",
}
PER_POINT = (
    "what a trial cost more than the trial of the experiment's own values, for each point of validation accuracy "
    "above it; of one training each, so without an interval: it ranks trials, it proves no gain"
)
METHODS = {
    "ped_anova": "PED-ANOVA: how far the best tenth (five at least, half at most) lie apart from all trials; one "
    "that was given up counts as worse than any complete one",
    "fanova": "fANOVA over complete trials: the share of the variance that a random forest gives each parameter",
}


def headline(view: SearchView) -> str:
    """Return in one or two sentences what was found, against the experiment's own values."""
    counts = Counter(trial.state for trial in view.trials)
    if view.best is None:
        reasons = [trial.reason for trial in view.trials if trial.reason]
        why = f" (the first: {reasons[0].rstrip('.')})" if reasons else ""
        said = (
            f"{counts['failed']} failed{why}, {counts['pruned']} were pruned" if view.trials else "none was made"
        )
        return f"No trial completed: of {len(view.trials)}, {said}. The experiment's own values stand."
    if len(view.directions) > 1:
        return _front(view)
    return _single(view, view.best)


def _single(view: SearchView, best: Trial) -> str:
    metric, of = view.main, f"of {len(view.trials)} trials" if len(view.trials) > 1 else "of one trial"
    value = f"{NAMES[metric]} {show(metric, best.values[metric])}"
    if view.own is None:
        own = "The experiment's own values are not among the complete trials."
        return f"Trial {best.index} is the best {of}: {value}. {own}"
    own = f"the experiment's own values (trial {view.own.index}"
    gain = best.values[metric] - view.own.values[metric]
    if best is view.own or gain == 0:
        return f"None {of} is better than {own}): {value}."
    better = "above" if gain > 0 else "below"
    return (
        f"Trial {best.index} is the best {of}: {value}, {show_gain(metric, gain)} {better} {own}: "
        f"{show(metric, view.own.values[metric])})."
    )


def _front(view: SearchView) -> str:
    ends = []
    for metric in view.directions:
        values = [trial.values[metric] for trial in view.front]
        low, high = show(metric, min(values)), show(metric, max(values))
        ends.append(f"{NAMES[metric]} {low}" if low == high else f"{NAMES[metric]} {low} to {high}")
    many = "1 trial is" if len(view.front) == 1 else f"{len(view.front)} trials are"
    said = f"{many} on the Pareto front of {len(view.trials)} ({', '.join(ends)})."
    if view.own is None:
        return said
    on = "are on it" if view.own in view.front else "are not: another trial is as good in all and better in one"
    return f"{said} The experiment's own values (trial {view.own.index}) {on}."


def caveat(view: SearchView) -> str:
    """Return what must not be concluded from the best of many."""
    said = []
    if len(view.complete) > 1:
        said.append(
            f"The best of {len(view.trials)} trials was chosen by the same validation images that measure it, so "
            "its value is biased upwards, the more so the more trials there are. What remains of the gain is told "
            "by the test split, which no trial has seen."
        )
    if halved := [f"trial {t.index} with {t.smaller_batch}" for t in view.trials if t.smaller_batch]:
        said.append(f"Memory did not suffice for the batch size that was asked for: {', '.join(halved)} instead.")
    return " ".join(said)


def write_search_page(
    out: Path,
    view: SearchView,
    search: SearchConfig,
    pictures: Sequence[tuple[str, Path]],
    remarks: Sequence[str],
) -> None:
    """Write the page; `remarks` say what was not evaluated or drawn, and why."""
    text = render(
        "search.html.jinja",
        title=f"Search: {view.name}",
        headline=headline(view),
        caveat=caveat(view),
        best=view.best.index if view.best else "",
        values="Values of the best trial" + (f" in {NAMES[view.main]}" if len(view.directions) > 1 else ""),
        found=_found(view) if view.best else [],
        pictures=embedded(pictures),
        remarks=remarks,
        order="the best first" if len(view.directions) == 1 else "the Pareto front first",
        head=["trial", "state", *(NAMES[m] for m in view.directions), *short_names(view.space).values(),
              "epochs", "seconds", *(["$", "$ per point"] if view.paid else []), "remark"],
        rows=[_row(view, trial) for trial in _ranked(view)[:MOST_TRIALS]],
        more=max(0, len(view.trials) - MOST_TRIALS),
        facts=_facts(view, search),
    )  # fmt: skip
    out.write_text(text, encoding="utf-8")


def _found(view: SearchView) -> list[list[str]]:
    """Return a row a parameter: name, the best trial's value, the experiment's own, importance."""
    own = view.own.parameters if view.own else {}
    best = view.best.parameters if view.best else {}
    weights = view.importances.get(view.main, {})
    return [
        [name, *(show_parameter(values[name]) if name in values else "–" for values in (best, own)),
         f"{weights[name]:.0%}" if name in weights else "–"]
        for name in view.space
    ]  # fmt: skip


def _ranked(view: SearchView) -> list[Trial]:
    """Return the trials from the best to the worst; those without a value come last."""
    sign = -1 if view.directions[view.main] == "maximize" else 1
    states = ("complete", "pruned", "failed")
    several = len(view.directions) > 1

    def key(trial: Trial) -> tuple[object, ...]:
        behind = several and trial not in view.front
        return states.index(trial.state), behind, sign * trial.values.get(view.main, 0.0), trial.index

    return sorted(view.trials, key=key)


def _row(view: SearchView, trial: Trial) -> list[str]:
    remark = trial.reason
    if trial is view.own:
        remark = "own values"
    elif len(view.directions) > 1 and trial in view.front:
        remark = "on the front"
    if trial.smaller_batch:
        remark = f"{remark}{remark and '; '}batch size {trial.smaller_batch}, for lack of memory"
    values = [show(m, trial.values[m]) if m in trial.values else "–" for m in view.directions]
    parameters = [show_parameter(trial.parameters[n]) if n in trial.parameters else "–" for n in view.space]
    return [
        str(trial.index),
        trial.state,
        *values,
        *parameters,
        f"{trial.epochs:g}",
        f"{trial.seconds:.1f}",
        *([dollars(trial.usd), _per_point(view, trial)] if view.paid else []),
        remark,
    ]


def _per_point(view: SearchView, trial: Trial) -> str:
    if view.points_gained(trial) is None:
        return "–"
    each = view.usd_per_point(trial)
    if each is None:
        return "no gain"
    return dollars(each) if each > 0 else "cheaper"


def _facts(view: SearchView, search: SearchConfig) -> Mapping[str, str]:
    counts = Counter(trial.state for trial in view.trials)
    seconds, usd = sum(t.seconds for t in view.trials), sum(t.usd for t in view.trials)
    spent = f"{sum(t.epochs for t in view.trials):g} epochs, {seconds / 60:.1f} minutes of trials"
    settings = ", ".join(f"{name}={label_of(value)}" for name, value in search.settings.items())
    seeds = f"the mean over {search.seeds} seeds" if search.seeds > 1 else "one seed"
    limits = [f"{search.budget.trials} trials"]
    limits += [f"{search.budget.minutes:g} minutes"] if search.budget.minutes else []
    limits += [f"${search.budget.dollars:g}"] if search.budget.dollars else []
    share = search.sampler.random_share
    mixed = f"; {share:.0%} of the later trials stay random" if share else ""
    return {
        "trials": ", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "failed")),
        "spent": spent + (f", {show('cost/usd', usd)}" if usd else ""),
        "budget": " or ".join(limits),
        "a trial": f"the experiment's recipe{f' with {settings}' if settings else ''}, {seeds}",
        "sampler": SAMPLERS[search.sampler.name].format(n=search.sampler.startup_trials) + mixed,
        "pruner": PRUNERS[search.pruner.name].format(f=search.pruner.reduction_factor),
        "importance": METHODS[search.importance],
        **({"$ per point": PER_POINT} if view.paid else {}),
    }
