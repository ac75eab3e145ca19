"""From `params.yaml`, `conf/` and overrides to a validated configuration, with every mistake at once.

`compose` joins the three; the stage `configure` writes its result to `params.lock.yaml`; every later stage
reads from there only the sections that its own dataclass declares (`load_locked`), so what a stage can
read and what `dvc.yaml` lists are one. The only user of Hydra: its Compose API resolves the group choices.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_tuning.config.check import Section, check_backbone, mended, report, validated
from cnn_tuning.config.patching import to_plain
from cnn_tuning.config.schema import Config
from cnn_tuning.config.values import (
    Choices,
    Value,
    assign,
    compose_groups,
    drop_unchosen,
    name_options,
    node_of,
    read_overrides,
    read_params,
    resolve,
    split,
    with_defaults,
)
from cnn_tuning.config.variants import check_variants, needs_price, with_derived
from cnn_tuning.errors import UserError, redact

LOCK = Path("params.lock.yaml")
PARAMS = Path("params.yaml")
CONF = Path("conf")
# Set by a rented host's agent: what the host costs, in US dollars per hour.
PRICE = "CNN_TUNING_PRICE_PER_HOUR"


def sections_of(kind: type) -> frozenset[str]:
    """Return the names of the sections that a stage's dataclass declares."""
    return frozenset(f.name for f in dataclasses.fields(kind))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": value}` for a nested mapping; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def validate(kind: type[Section], tree: Mapping[str, Any]) -> Section:
    """Return `tree` as the dataclass `kind`, or raise one `UserError` that lists every mistake."""
    problems: list[str] = []
    config = validated(kind, tree, problems, {})
    if config is None:
        raise report(problems)
    return config


def load_locked(kind: type[Section], path: Path = LOCK) -> Section:
    """Read from `params.lock.yaml` the sections that the dataclass `kind` declares, at this host's own price."""
    import yaml

    if not path.exists():
        raise UserError(f"{path} is missing: run `dvc repro configure` first")
    try:
        text = path.read_text(encoding="utf-8")
        node_of(text, path)
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, UserError, ValueError, TypeError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: run `dvc repro -f configure`")
    return _priced(validate(kind, {k: v for k, v in tree.items() if k in sections_of(kind)}))


def select(kind: type[Section], config: Config) -> Section:
    """Return the sections of a whole configuration that `kind` declares, at this host's own price."""
    return _priced(kind(**{name: getattr(config, name) for name in sections_of(kind)}))


def _priced(section: Section) -> Section:
    """Return the sections with the price of the rented host (`PRICE`) in place of a configured one.

    `params.yaml` comes with the code from a machine that costs something else. The host's price is no parameter:
    nothing runs again for it.
    """
    tracking, price = getattr(section, "tracking", None), _own_price()
    if tracking is None or price is None:
        return section
    priced = dataclasses.replace(tracking, price_per_hour=price)
    return dataclasses.replace(section, tracking=priced)  # type: ignore[type-var]


def _own_price() -> float | None:
    told = os.environ.get(PRICE)
    try:
        return float(told) if told else None
    except ValueError:
        raise UserError(f"{PRICE}: got {told!r}, must be US dollars per hour, such as 0.526") from None


def compose(overrides: Sequence[str] = (), *, params: Path | None = PARAMS, conf: Path = CONF) -> Config:
    """Compose `conf/`, then `params.yaml`, then command-line overrides in Hydra's grammar; check it all.

    Raises:
        UserError: names every mistake, each with its place and the nearest valid name.
    """
    problems: list[str] = []
    config, sound, unsure = _composed(Config, overrides, params, conf, problems)
    if sound is not None:
        problems += [] if unsure & {"model", "trainer"} else check_backbone(sound)
        problems += [*check_variants(sound, unsure), *_check_price(sound)]
    if problems or config is None:
        raise report(problems)
    return with_derived(config)


def _check_price(config: Config) -> Iterator[str]:
    if config.tracking.price_per_hour or _own_price():
        return
    if config.search.budget.dollars is not None:
        yield "search.budget.dollars: needs tracking.price_per_hour"
    if needs_price(config.search):
        yield "search.objectives: cost/usd needs tracking.price_per_hour; or use time/train_seconds"


def compose_sections(kind: type[Section], overrides: Sequence[str] = ()) -> Section:
    """Compose only the sections that the dataclass `kind` declares: mistakes in others stop nothing.

    Raises:
        UserError: names every mistake in these sections, and overrides of others.
    """
    problems: list[str] = []
    config, _, _ = _composed(kind, overrides, PARAMS, CONF, problems)
    if problems or config is None:
        raise report(problems)
    return config


def _composed(
    kind: type[Section], overrides: Sequence[str], params: Path | None, conf: Path, problems: list[str]
) -> tuple[Section | None, Section | None, set[str]]:
    """Return the sections of `kind`, None if they are wrong; the same with wrong values as they are in `conf/`;
    and the groups whose choice is wrong: what they hold is not known.
    """
    if not (conf / "config.yaml").is_file():
        raise UserError(f"no {conf}/config.yaml here: run this in the project's top folder")
    wanted, every = sections_of(kind), sections_of(Config)
    # Not asked for, but what is may be changed by the one and named after the other.
    behind = wanted | {"experiment", "data"}
    choices: dict[str, Choices] = {}
    values: list[Value] = []
    if params is not None:
        split(read_params(params), conf, choices, values)
    if wanted != every:
        values = [value for value in values if value.path[0] in wanted]
        choices = {group: choice for group, choice in choices.items() if group in behind}
    for place, tree in read_overrides(overrides, problems):
        if wanted != every and not set(tree) <= behind:
            problems.append(f"{place}: not among {', '.join(sorted(wanted))}, which this command reads")
        split((place, tree, {}), conf, choices, values)
    tree, unsure = compose_groups(choices, conf, problems)
    drop_unchosen(tree)
    with_defaults(Config, tree)
    sound = copy.deepcopy(tree)
    places: dict[str, str] = {}
    for value in values:
        assign(tree, value, places, problems)
    if wanted != every:
        tree = {name: tree[name] for name in behind if name in tree}
    resolved = resolve(tree, problems)
    name_options(resolved, conf, problems)
    own = resolved if wanted == every else {name: resolved[name] for name in wanted if name in resolved}
    config = validated(kind, own, problems, places)
    if config is not None:
        return config, config, unsure
    rest = resolve(sound, [])
    name_options(rest, conf, [])
    return None, validated(kind, mended(kind, own, rest), [], {}), unsure


def lock_text(config: Config) -> str:
    """Return the text of `params.lock.yaml`: every value of this experiment, resolved.

    Raises:
        UserError: a value holds a secret, which must not reach a file that is committed.
    """
    import yaml

    texts = {name: json.dumps(value) for name, value in flatten(to_plain(config)).items()}
    secret = [name for name, text in texts.items() if redact(text) != text]
    if secret:
        raise UserError(
            f"{', '.join(secret)}: holds a secret, and {LOCK} is committed: give it in the environment instead, "
            "such as MLFLOW_TRACKING_URI"
        )
    head = "# Written by the stage `configure` from params.yaml and conf/: every value, resolved. Do not edit.\n"
    return head + yaml.safe_dump(to_plain(config), sort_keys=False, width=100, allow_unicode=True)
