"""Variants of a recipe: arms of an ablation and points of a search space, checked before any is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, replace
from typing import Any

from cnn_tuning.config.patching import patch
from cnn_tuning.config.schema import (
    Choice,
    Config,
    Dimension,
    FloatRange,
    IntRange,
    QuestionConfig,
    Recipe,
    SearchConfig,
)
from cnn_tuning.errors import UserError
from cnn_tuning.machine import usable_cores

Levels = Mapping[str, Any]
EQUAL_UPDATES = ", equal updates"  # ends the label of an arm
VARIED = tuple(field.name for field in fields(Recipe))
OTHERS = {field.name for field in fields(Config)} - {*VARIED}


def levels_of(values: Sequence[Any] | Mapping[str, Any]) -> Levels:
    """Return label → value; a value without a label of its own is its label."""
    return values if isinstance(values, Mapping) else {label_of(value): value for value in values}


def label_of(value: Any) -> str:
    """Return a value as a person writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def arms(recipe: Recipe, question: QuestionConfig) -> dict[str, Recipe]:
    """Return the arms by label, such as `dropout=both`; the reference comes first.

    Raises:
        UserError: a name or a value is wrong, or `reference` is no arm.
    """
    if question.equal != "epochs" and "trainer.max_epochs" in question.factors:
        raise UserError(f"equal: got {question.equal!r}, must be 'epochs' where trainer.max_epochs is a factor")
    common = patch(recipe, question.settings, "settings")
    factors = {name: levels_of(values) for name, values in question.factors.items()}
    found: dict[str, Recipe] = {}
    for combination in itertools.product(*(levels.items() for levels in factors.values())):
        changes = {name: value for name, (_, value) in zip(factors, combination, strict=True)}
        label = ", ".join(
            f"{name.rpartition('.')[2]}={level}" for name, (level, _) in zip(factors, combination, strict=True)
        )
        found[label] = patch(common, changes, "factors")
    reference = question.reference or next(iter(found))
    if reference not in found:
        raise UserError(f"reference: got {reference!r}, must be one of {', '.join(map(repr, found))}")
    if len(found) < 2:
        raise UserError("factors: one arm only, nothing to compare")
    ordered = {reference: found[reference], **found}
    return _balanced(ordered, reference, question.equal)


def _balanced(found: dict[str, Recipe], reference: str, equal: str) -> dict[str, Recipe]:
    """Give arms of another batch size as many updates as the reference makes, where that is asked."""
    if equal == "epochs":
        return found
    standard = found[reference].trainer
    balanced: dict[str, Recipe] = {}
    for label, arm in found.items():
        epochs = max(1, round(standard.max_epochs * arm.trainer.batch_size / standard.batch_size))
        if epochs == arm.trainer.max_epochs:
            balanced[label] = arm
            continue
        if equal == "both":
            balanced[label] = arm
            label += EQUAL_UPDATES
        balanced[label] = patch(arm, {"trainer.max_epochs": epochs})
    return balanced


def side_by_side(recipe: Recipe, workers: int) -> Recipe:
    """Return the recipe with each worker's share of a stream's disk, and of the cores unless it names its threads.

    Part of the recipe: results are equal to the bit only at an equal number of threads.
    """
    trainer = recipe.trainer
    changes: dict[str, float] = {}
    if workers > 1 and trainer.threads is None:
        processes = workers * (trainer.devices if isinstance(trainer.devices, int) else 1)
        changes["trainer.threads"] = max(1, usable_cores() // processes)
    if workers > 1 and trainer.stream is not None:
        changes["trainer.stream_cache_gb"] = trainer.stream_cache_gb / workers
    return patch(recipe, changes) if changes else recipe


def applies(dimension: Dimension, chosen: Mapping[str, str]) -> bool:
    """Return whether a dimension is part of a trial with these labels chosen so far."""
    return all(chosen.get(name) in _wanted(labels) for name, labels in dimension.when.items())


def _wanted(labels: Any) -> set[str]:
    return {label_of(label) for label in (labels if isinstance(labels, list) else [labels])}


def grid(search: SearchConfig) -> Iterator[dict[str, Any]]:
    """Give every point of a space without continuous dimensions: dotted name → label or number."""
    seen = set()
    for values in itertools.product(*map(_points, search.space.values())):
        chosen: dict[str, Any] = {}
        for (name, dimension), value in zip(search.space.items(), values, strict=True):
            if applies(dimension, {n: label_of(v) for n, v in chosen.items()}):
                chosen[name] = value
        key = tuple(chosen.items())
        if key not in seen:
            seen.add(key)
            yield chosen


def _points(dimension: Dimension) -> list[Any]:
    if isinstance(dimension, Choice):
        return list(levels_of(dimension.choices))
    if isinstance(dimension, IntRange):
        return list(range(dimension.low, dimension.high + 1, dimension.step))
    if dimension.step is None:
        raise UserError("a grid needs a step for a float, or choices")
    count = int((dimension.high - dimension.low) / dimension.step + 1e-9) + 1
    return [dimension.low + i * dimension.step for i in range(count)]


def changes_of(search: SearchConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted name → value for a trial's labels and numbers."""
    changes: dict[str, Any] = {}
    for name, value in chosen.items():
        dimension = search.space[name]
        changes[name] = levels_of(dimension.choices)[value] if isinstance(dimension, Choice) else value
    return changes


def check_variants(config: Config, unsure: Set[str] = frozenset()) -> list[str]:
    """Return the mistakes in the ablations and the search of a configuration, each with its place.

    `unsure`: sections of which it is not known yet what they are; what varies them is left out.
    """
    recipe = recipe_of(config)
    problems: list[str] = []
    for name, question in config.ablation.questions.items():
        if unsure & {"ablation", *_sections([*question.factors, *question.settings])}:
            continue
        told = [f"settings: {n}: {why}" for n, why in _fixed(question.settings)]
        told += [f"factors: {n}: {why}" for n, why in _fixed(question.factors)]
        try:
            if not told:
                arms(recipe, question)
        except UserError as error:
            told = _lines(error)
        problems += [f"ablation.questions.{name}.{line}" for line in told]
    if "search" not in unsure:
        problems += [f"search.{line}" for line in _search_problems(config.search, recipe, unsure)]
    return problems


def _sections(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _fixed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Give the names that the configuration has but that cannot vary between trainings, and why not."""
    for name in names:
        if _sections([name]) & OTHERS:
            first = "data are prepared before anything is trained: they " if _sections([name]) == {"data"} else ""
            yield name, f"{first}cannot vary, only {', '.join(VARIED)} can"


def needs_price(search: SearchConfig) -> bool:
    """Return whether the price of an hour decides which trial is best."""
    return any(objective.metric == "cost/usd" for objective in search.objectives)


def with_derived(config: Config) -> Config:
    """Return the configuration with what follows from it, for DVC, which compares mappings without their order:
    each ablation's reference, and the rules that may end a training."""
    recipe = recipe_of(config)
    questions = {
        name: replace(question, reference=next(iter(arms(recipe, question))))
        for name, question in config.ablation.questions.items()
    }
    rules = config.diagnosis.rules
    stopping = {name: dict(rule.thresholds) for name, rule in rules.items() if rule.action == "stop"}
    return replace(
        config,
        ablation=replace(config.ablation, questions=questions),
        diagnosis=replace(config.diagnosis, stopping=stopping),
    )


def recipe_of(config: Recipe) -> Recipe:
    """Return only what decides the weights of a configuration that holds more sections."""
    return Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})


def _search_problems(search: SearchConfig, recipe: Recipe, unsure: Set[str]) -> Iterator[str]:
    if not search.space:
        return
    yield from (f"settings: {name}: {why}" for name, why in _fixed(search.settings))
    yield from (f"space.{name}: {why}" for name, why in _fixed(search.space))
    common, left_out = recipe, unsure | OTHERS
    for name, value in sorted(search.settings.items(), key=lambda item: item[0].count(".")):
        try:
            common = patch(common, {} if _sections([name]) & left_out else {name: value}, "settings")
        except UserError as error:
            yield from _lines(error)
    for name in search.space:
        if not _sections([name]) & left_out:
            yield from (f"space.{name}: {line}" for line in _dimension_problems(search, common, name))
    if search.pruner.name != "none" and len(search.objectives) > 1:
        yield f"pruner.name: got {search.pruner.name!r}, must be 'none' with several objectives"
    if search.pruner.name != "none" and not search.objectives[0].metric.startswith("val/"):
        yield f"pruner.name: got {search.pruner.name!r}, but only val/accuracy and val/loss have curves: 'none'"
    if search.pruner.name == "wilcoxon" and search.seeds < 4:
        yield f"seeds: got {search.seeds}, must be at least 4 for the pruner 'wilcoxon', which pairs them"
    if search.sampler.name == "cmaes" and len(search.objectives) > 1:
        yield "sampler.name: 'cmaes' has one objective; use 'tpe', 'gp' or 'random'"
    if search.sampler.name == "cmaes" and all(isinstance(d, Choice) or d.when for d in search.space.values()):
        yield "sampler.name: 'cmaes' draws ranges without `when`, of which there is none; use 'tpe'"
    if search.storage != "journal" and not search.storage.startswith(("postgresql://", "postgresql+psycopg://")):
        yield f"storage: got {search.storage!r}, must be 'journal' or postgresql://user@host/database"


def _dimension_problems(search: SearchConfig, common: Recipe, name: str) -> Iterator[str]:
    dimension, names = search.space[name], list(search.space)
    for other, labels in dimension.when.items():
        if other not in names[: names.index(name)]:
            yield f"when: {other!r} is no dimension before it"
            return
        known = search.space[other]
        offered = {label_of(x) for x in _points(known)} if not isinstance(known, FloatRange) else set()
        wrong = sorted(_wanted(labels) - offered)
        if wrong:
            yield f"when.{other}: {wrong[0]!r} is none of its values"
            return
    if isinstance(dimension, FloatRange | IntRange):
        if dimension.low >= dimension.high:
            yield f"low: got {dimension.low:g}, must be below high, {dimension.high:g}"
        if dimension.log and dimension.low <= 0:
            yield f"low: got {dimension.low:g}, must be above 0 where log is true"
        if dimension.log and dimension.step not in (None, 1 if isinstance(dimension, IntRange) else None):
            yield "step: a logarithmic range has none"
        ends: list[Any] = [dimension.low, dimension.high]
    else:
        ends = list(levels_of(dimension.choices).values())
    if search.sampler.name == "grid":
        try:
            _points(dimension)
        except UserError as error:
            yield str(error)
    for around in _surroundings(search, name):
        try:
            inside = patch(common, changes_of(search, around))
        except UserError:
            continue  # the other dimension's own mistake
        labels = ", ".join(f"{other}={label_of(label)}" for other, label in around.items())
        for value in ends:
            try:
                patch(inside, {name: value}, "value")
            except UserError as error:
                where = f" (with {labels}; `when` can leave that out)" if labels else ""
                yield from (f"{line}{where}" for line in _lines(error))
                return


def _surroundings(search: SearchConfig, name: str) -> list[dict[str, Any]]:
    """Return the labels of whole sections that a trial may combine with a dimension within them."""
    space = search.space
    around = [other for other in space if name.startswith(f"{other}.")]
    asked = {name, *around}
    while further := {other for one in asked for other in space[one].when if other in space} - asked:
        asked |= further
    order = [other for other in space if other in asked - {name}]
    found: list[dict[str, Any]] = []
    for labels in itertools.product(*(_told_apart(search, other, other in around) for other in order)):
        chosen: dict[str, str] = {}
        for other, label in zip(order, labels, strict=True):
            if applies(space[other], chosen):
                chosen[other] = label_of(label)
        if not applies(space[name], chosen):
            continue
        choices = {o: label for o, label in zip(order, labels, strict=True) if o in around and o in chosen}
        if choices not in found:
            found.append(choices)
    return found


def _told_apart(search: SearchConfig, name: str, every: bool) -> list[Any]:
    """Return all labels of a dimension, or only those that a `when` names and one that none does."""
    dimension = search.space[name]
    if isinstance(dimension, FloatRange):  # no `when` may name it
        return [dimension.low]
    points = _points(dimension)
    named = {label for d in search.space.values() if name in d.when for label in _wanted(d.when[name])}
    others = [point for point in points if label_of(point) not in named]
    return points if every else [point for point in points if label_of(point) in named] + others[:1]


def _lines(error: UserError) -> list[str]:
    lines = str(error).splitlines()
    return [line.strip() for line in (lines[1:] or lines)]
