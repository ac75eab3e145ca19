"""From text to one tree of values: `params.yaml` and overrides, sorted into group choices and values by name.

Mistakes are collected, not raised, so that all can be told together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from cnn_tuning.config.check import nearest, report
from cnn_tuning.config.schema import EarlyStoppingConfig, FinetuneConfig, WeightsConfig
from cnn_tuning.errors import UserError

# Groups of which several options may be chosen at once.
SEVERAL = frozenset({"ablation"})
# Mappings whose keys a person makes up, and those of them that hold whole values, not further settings.
FREE = ("ablation.questions", "search.space")
WHOLE = ("ablation.questions.*.factors", "ablation.questions.*.settings", "search.space.*.when", "search.settings")
MOST_VALUES = 100_000
Choices = tuple[tuple[str, ...], str]  # the options chosen of a group, and the place that chose them


@dataclass(frozen=True)
class Value:
    """A value by its path in the tree, and the place (file and line, or override) that it was read from."""

    path: tuple[str, ...]
    value: Any
    place: str


def read_params(path: Path) -> tuple[str, dict[str, Any], dict[tuple[str, ...], int]]:
    """Return the file's name, its tree and the line of each key."""
    from omegaconf import OmegaConf

    try:
        text = path.read_text(encoding="utf-8")
        node = node_of(text, path)
        # OmegaConf's loader reads 1e-3 as a number; PyYAML's own reads a string.
        tree = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it with `git checkout {path}`") from None
    except UserError:
        raise
    except Exception as error:  # dates, numbers and ${…} each fail in a way of their own
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise UserError(f"{where}: not valid YAML: {reason.splitlines()[0][:200]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    return str(path), {str(k): v for k, v in tree.items()}, dict(_lines(node))


def node_of(text: str, path: Path) -> Any:
    """Return a YAML text's topmost node, of which aliases make no more than `MOST_VALUES`.

    A few lines of aliases of aliases stand for billions of values.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _values(node, {})
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply, or a part of itself") from None
    if values > MOST_VALUES:
        raise UserError(f"{path}: its aliases (*name) stand for more than {MOST_VALUES} values: write them out")
    return node


def _values(node: Any, known: dict[int, int]) -> int:
    import yaml

    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _lines(node: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _lines(value, path)


def read_overrides(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each override of Hydra's grammar as (place, tree); those that are none are told."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(f"{text!r} is not an override: write key=value, e.g. trainer.max_epochs=3")
            continue
        if override.is_delete() or override.is_sweep_override() or override.is_add():
            problems.append(f"{text!r}: only key=value is accepted here")
            continue
        value = override.value()
        for key in reversed(override.key_or_group.replace("/", ".").split(".")):
            value = {key: value}
        yield f"override {text!r}", value  # type: ignore[misc]


def split(
    source: tuple[str, dict[str, Any], dict[tuple[str, ...], int]],
    conf: Path,
    choices: dict[str, Choices],
    values: list[Value],
) -> None:
    """Sort a tree into group choices (`model: x` or `model: {name: x}`) and values by path."""
    file, tree, lines = source

    def place(path: tuple[str, ...]) -> str:
        return f"{file}:{lines[path]}" if path in lines else file

    for group, node in tree.items():
        if not (conf / group).is_dir():
            values.append(Value((group,), node, place((group,))))
            continue
        name = node.get("name") if isinstance(node, dict) else node
        if isinstance(name, list) and name and all(isinstance(option, str) for option in name):
            choices[group] = (tuple(name), place((group,)))
            continue
        if isinstance(name, str):
            choices[group] = ((name,), place((group,)))
        if isinstance(node, dict):
            for dotted, leaf in _leaves({k: v for k, v in node.items() if k != "name"}, (group,)):
                values.append(Value(dotted, leaf, place(dotted)))
        elif not isinstance(name, str):
            values.append(Value((group,), node, place((group,))))


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, dict) and value and not _is_in(prefix, WHOLE):
            yield from _leaves(value, path)
        else:
            yield path, value


def _is_in(path: tuple[str, ...], patterns: Sequence[str]) -> bool:
    return any(
        len(path) == len(parts) and all(part in ("*", key) for part, key in zip(parts, path, strict=True))
        for parts in (pattern.split(".") for pattern in patterns)
    )


def compose_groups(
    choices: Mapping[str, Choices], conf: Path, problems: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """Return what Hydra composes of `conf/` with these group choices, and the groups whose choice is wrong."""
    arguments, unsure = [], set()
    for group, (chosen, place) in choices.items():
        wrong = list(_wrong_options(group, chosen, conf, place, problems))
        if len(chosen) > 1 and group not in SEVERAL:
            problems.append(f"{place}: {group}: got {len(chosen)} options, must be one")
            unsure.add(group)
        elif wrong:
            unsure.add(group)
        else:
            several = len(chosen) > 1 or group in SEVERAL
            arguments.append(f"{group}=[{','.join(chosen)}]" if several else f"{group}={chosen[0]}")
    return _composed_by_hydra(conf, "config", arguments), unsure


def _wrong_options(
    group: str, chosen: Sequence[str], conf: Path, place: str, problems: list[str]
) -> Iterator[str]:
    options = sorted(p.stem for p in (conf / group).glob("*.yaml"))
    for option in chosen:
        if option not in options:
            problems.append(f"{place}: {group}: no option {option!r}{nearest(option, options)}")
            yield option


def _composed_by_hydra(conf: Path, name: str, arguments: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            composed = hydra_compose(name, overrides=arguments)
    except HydraException as error:
        raise UserError(f"{conf}/ does not compose: {str(error).splitlines()[0]}") from None
    OmegaConf.set_struct(composed, False)
    return OmegaConf.to_container(composed, resolve=False)  # type: ignore[return-value]


def drop_unchosen(tree: dict[str, Any]) -> None:
    """Forget, in place, what an experiment changes in ablations that are not chosen."""
    questions = tree.get("ablation", {}).get("questions", {})
    for name in [name for name, question in questions.items() if "question" not in question]:
        del questions[name]


def with_defaults(kind: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with what a YAML may leave out, so that it can be set by name all the same."""
    types = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if item.name not in tree:
            if item.default is not dataclasses.MISSING:
                tree[item.name] = _plain(item.default)
            elif item.default_factory is not dataclasses.MISSING:
                tree[item.name] = item.default_factory()
        node = tree.get(item.name)
        hint = types[item.name]
        if get_origin(hint) is dict and isinstance(node, dict):
            for entry in node.values():
                _fill(get_args(hint)[1], entry)
        else:
            _fill(hint, node)
    return tree


def _plain(default: Any) -> Any:
    if isinstance(default, tuple | list):
        return [_plain(item) for item in default]
    nested = dataclasses.is_dataclass(default) and not isinstance(default, type)
    return dataclasses.asdict(default) if nested else default


def _fill(hint: Any, node: Any) -> None:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for member in filter(dataclasses.is_dataclass, members):
        hints = get_type_hints(member)
        tag = "kind" if "kind" in hints else "name"
        if isinstance(node, dict) and (not get_args(hints.get(tag)) or node.get(tag) in get_args(hints[tag])):
            with_defaults(member, node)


def name_options(tree: dict[str, Any], conf: Path, problems: list[str]) -> None:
    """Replace, in place, options of a group that a factor or a search names, by what stands in `conf/`."""
    known: dict[tuple[str, str], Any] = {}

    def section(group: str, option: str) -> Any:
        if (group, option) not in known:
            wrong = list(_wrong_options(group, [option], conf, "conf", problems))
            composed = {} if wrong else _composed_by_hydra(conf, f"{group}/{option}", [])
            known[group, option] = resolve(composed, []).get(group)
        return known[group, option]

    for question in tree.get("ablation", {}).get("questions", {}).values():
        _expand(question.get("factors"), section, conf)
    for name, dimension in tree.get("search", {}).get("space", {}).items():
        if isinstance(dimension, dict) and isinstance(dimension.get("choices"), list):
            holder = {name: dimension["choices"]}
            _expand(holder, section, conf)
            dimension["choices"] = holder[name]


def _expand(factors: Any, section: Callable[[str, str], Any], conf: Path) -> None:
    for name, levels in factors.items() if isinstance(factors, dict) else ():
        if (conf / name).is_dir() and isinstance(levels, list) and all(isinstance(level, str) for level in levels):
            factors[name] = {level: section(name, level) for level in levels}


def assign(tree: dict[str, Any], value: Value, places: dict[str, str], problems: list[str]) -> None:
    """Set one value in place; a name that the composed configuration lacks is a mistake."""
    node: Any = tree
    made_up = False
    for depth, key in enumerate(value.path):
        made_up = made_up or (isinstance(node, dict) and _is_in(value.path[:depth], (*FREE, *WHOLE)))
        if made_up and depth < len(value.path) - 1:
            node = node.setdefault(key, {})
            continue
        if not made_up and (not isinstance(node, dict) or key not in node):
            known = list(node) if isinstance(node, dict) else []
            dotted = ".".join(value.path[: depth + 1])
            hint = f"; nest it, as in {key.split('.')[0]}: {{…}}" if "." in key else nearest(key, known)
            problems.append(f"{value.place}: {dotted}: unknown name{hint}")
            return
        if depth < len(value.path) - 1:
            if node[key] is None:
                node[key] = _default_of(value.path[: depth + 1])
            node = node[key]
    dotted, last = ".".join(value.path), value.path[-1]
    if made_up:
        node[last] = value.value
        places[dotted] = value.place
    elif isinstance(node[last], dict) and not isinstance(value.value, dict | None):
        problems.append(f"{value.place}: {dotted}: expected a mapping, got {value.value!r}")
    elif "arguments" in value.path and not _same_kind(node[last], value.value):
        problems.append(f"{value.place}: {dotted}: got {value.value!r}, must be like {node[last]!r}")
    else:
        node[last] = value.value
        places[dotted] = value.place


def _same_kind(known: Any, given: Any) -> bool:
    """Tell whether a free-form argument has the type of the value in `conf/`, its only schema; null may be one."""
    if isinstance(known, list) and isinstance(given, list):
        return all(_same_kind(known[0], item) for item in given) if known else True
    if isinstance(known, float):
        return isinstance(given, int | float) and not isinstance(given, bool)
    return known is None or given is None or type(known) is type(given)


def _default_of(path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return an empty form of an optional section (null in YAML) so that its keys can be set."""
    optional: dict[tuple[str, ...], type] = {
        ("trainer", "early_stopping"): EarlyStoppingConfig,
        ("trainer", "finetune"): FinetuneConfig,
        ("model", "weights"): WeightsConfig,
    }
    if path not in optional:
        return None
    fields = dataclasses.fields(optional[path])
    return {f.name: None if f.default is dataclasses.MISSING else _plain(f.default) for f in fields}


def resolve(tree: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the tree with interpolations replaced; a value still missing (`???`) is a mistake."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create(tree)
    problems += [f"{key}: a value is required" for key in sorted(OmegaConf.missing_keys(config))]
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise report([*problems, f"interpolation fails: {str(error).splitlines()[0]}"]) from None
