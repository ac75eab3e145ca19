"""From `params.yaml`, `conf/` and overrides to a validated configuration, with every mistake at once.

`compose` joins the three; the stage `configure` writes its result to `params.lock.yaml`; every later stage
reads from there only the sections that its own dataclass declares (`load_locked`), so what a stage can
read and what `dvc.yaml` lists are one. The only user of Hydra: its Compose API resolves the group choices.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cnn_tuning.config.schema import Config, EarlyStoppingConfig
from cnn_tuning.errors import UserError

LOCK = Path("params.lock.yaml")
PARAMS = Path("params.yaml")
CONF = Path("conf")

Section = TypeVar("Section")


def sections_of(kind: type) -> frozenset[str]:
    """Return the names of the sections that a stage's dataclass declares."""
    return frozenset(f.name for f in dataclasses.fields(kind))


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists and scalars, as JSON and YAML hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


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
    config = _validated(kind, tree, problems, {})
    if config is None:
        raise _report(problems)
    return config


def load_locked(kind: type[Section], path: Path = LOCK) -> Section:
    """Read from `params.lock.yaml` the sections that the dataclass `kind` declares."""
    import yaml

    if not path.exists():
        raise UserError(f"{path} is missing: run `dvc repro configure` first")
    tree = yaml.safe_load(path.read_text())
    return validate(kind, {k: v for k, v in tree.items() if k in sections_of(kind)})


def select(kind: type[Section], config: Config) -> Section:
    """Return the sections of a whole configuration that the dataclass `kind` declares."""
    return kind(**{name: getattr(config, name) for name in sections_of(kind)})


def compose(overrides: Sequence[str] = (), *, params: Path | None = PARAMS, conf: Path = CONF) -> Config:
    """Compose `conf/`, then `params.yaml`, then command-line overrides in Hydra's grammar; check it all.

    Raises:
        UserError: names every mistake, each with its place and the nearest valid name.
    """
    if not (conf / "config.yaml").is_file():
        raise UserError(f"no {conf}/config.yaml here: run this in the project's top folder")
    problems: list[str] = []
    choices: dict[str, str] = {}
    values: list[_Value] = []
    if params is not None:
        _split(_read_params(params), conf, choices, values)
    for place, tree in _read_overrides(overrides):
        _split((place, tree, {}), conf, choices, values)
    tree = _with_defaults(Config, _compose_groups(choices, conf, problems))
    places: dict[str, str] = {}
    for value in values:
        _assign(tree, value, places, problems)
    resolved = _resolve(tree, problems)
    config = _validated(Config, resolved, problems, places)
    if problems or config is None:
        raise _report(problems)
    return config


def patch(config: Section, changes: Mapping[str, Any]) -> Section:
    """Return `config` with values replaced by dotted name, validated again; a wrong name is an error."""
    problems: list[str] = []
    tree = to_plain(config)
    places: dict[str, str] = {}
    for dotted, value in changes.items():
        _assign(tree, _Value(tuple(dotted.split(".")), value, "change"), places, problems)
    patched = _validated(type(config), tree, problems, places)
    if problems or patched is None:
        raise _report(problems)
    return patched


def lock_text(config: Config) -> str:
    """Return the text of `params.lock.yaml`: every value of this experiment, resolved."""
    import yaml

    head = "# Written by the stage `configure` from params.yaml and conf/: every value, resolved. Do not edit.\n"
    return head + yaml.safe_dump(to_plain(config), sort_keys=True, width=100, allow_unicode=True)


# --- from text to values --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    path: tuple[str, ...]
    value: Any
    place: str


def _read_params(path: Path) -> tuple[str, dict[str, Any], dict[tuple[str, ...], int]]:
    """Return the file's name, its tree and the line of each key."""
    import yaml
    from omegaconf import OmegaConf

    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # OmegaConf's loader reads 1e-3 as a number; PyYAML's own reads a string.
        tree = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it with `git checkout {path}`") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    return str(path), {str(k): v for k, v in tree.items()}, dict(_lines(node))


def _lines(node: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _lines(value, path)


def _read_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            raise UserError(f"{text!r} is not an override: write key=value, e.g. trainer.max_epochs=3") from None
        if override.is_delete() or override.is_sweep_override() or override.is_add():
            raise UserError(f"{text!r}: only key=value is accepted here")
        value = override.value()
        for key in reversed(override.key_or_group.replace("/", ".").split(".")):
            value = {key: value}
        yield f"override {text!r}", value  # type: ignore[misc]


def _split(
    source: tuple[str, dict[str, Any], dict[tuple[str, ...], int]],
    conf: Path,
    choices: dict[str, str],
    values: list[_Value],
) -> None:
    """Sort a tree into group choices (`model: x` or `model: {name: x}`) and values by path."""
    file, tree, lines = source

    def place(path: tuple[str, ...]) -> str:
        return f"{file}:{lines[path]}" if path in lines else file

    for group, node in tree.items():
        if not (conf / group).is_dir():
            values.append(_Value((group,), node, place((group,))))
            continue
        name = node.get("name") if isinstance(node, dict) else node
        if isinstance(name, str):
            choices[group] = name
            choices[f"{group}@"] = place((group,))
        if isinstance(node, dict):
            for dotted, leaf in _leaves({k: v for k, v in node.items() if k != "name"}, (group,)):
                values.append(_Value(dotted, leaf, place(dotted)))
        elif not isinstance(name, str):
            values.append(_Value((group,), node, place((group,))))


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _compose_groups(choices: dict[str, str], conf: Path, problems: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    arguments = []
    for group, option in choices.items():
        if group.endswith("@"):
            continue
        options = sorted(p.stem for p in (conf / group).glob("*.yaml"))
        if option in options:
            arguments.append(f"{group}={option}")
        else:
            problems.append(f"{choices[group + '@']}: {group}: no option {option!r}{_nearest(option, options)}")
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            composed = hydra_compose("config", overrides=arguments)
    except HydraException as error:
        raise UserError(f"{conf}/ does not compose: {str(error).splitlines()[0]}") from None
    OmegaConf.set_struct(composed, False)
    return OmegaConf.to_container(composed, resolve=False)  # type: ignore[return-value]


def _with_defaults(kind: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with what a YAML may leave out, so that it can be set by name all the same."""
    types = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if item.name not in tree:
            if item.default is not dataclasses.MISSING:
                plain = dataclasses.is_dataclass(item.default)
                tree[item.name] = to_plain(item.default) if plain else item.default
            elif item.default_factory is not dataclasses.MISSING:
                tree[item.name] = item.default_factory()
        node = tree.get(item.name)
        hint = types[item.name]
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for member in filter(dataclasses.is_dataclass, members):
            names = get_args(get_type_hints(member).get("name"))
            if isinstance(node, dict) and (not names or node.get("name") in names):
                _with_defaults(member, node)
    return tree


def _assign(tree: dict[str, Any], value: _Value, places: dict[str, str], problems: list[str]) -> None:
    """Set one value in place; a name that the composed configuration lacks is a mistake."""
    node: Any = tree
    for depth, key in enumerate(value.path):
        if not isinstance(node, dict) or key not in node:
            known = list(node) if isinstance(node, dict) else []
            dotted = ".".join(value.path[: depth + 1])
            problems.append(f"{value.place}: {dotted}: unknown name{_nearest(key, known)}")
            return
        if depth < len(value.path) - 1:
            if node[key] is None:
                node[key] = _default_of(value.path[: depth + 1])
            node = node[key]
    dotted, last = ".".join(value.path), value.path[-1]
    if isinstance(node[last], dict) and not isinstance(value.value, dict | None):
        problems.append(f"{value.place}: {dotted}: expected a mapping, got {value.value!r}")
    elif "arguments" in value.path and not _same_kind(node[last], value.value):
        problems.append(f"{value.place}: {dotted}: got {value.value!r}, must be like {node[last]!r}")
    else:
        node[last] = value.value
        places[dotted] = value.place


def _same_kind(known: Any, given: Any) -> bool:
    """Tell whether a free-form argument has the type of the value in `conf/`, its only schema."""
    if isinstance(known, list) and isinstance(given, list):
        return all(_same_kind(known[0], item) for item in given) if known else True
    if isinstance(known, float):
        return isinstance(given, int | float) and not isinstance(given, bool)
    return known is None or type(known) is type(given)


def _default_of(path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return an empty form of an optional section (null in YAML) so that its keys can be set."""
    if path == ("trainer", "early_stopping"):
        return {f.name: None for f in dataclasses.fields(EarlyStoppingConfig)} | {"min_delta": 0.0}
    return None


def _resolve(tree: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create(tree)
    problems += [f"{key}: a value is required" for key in sorted(OmegaConf.missing_keys(config))]
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise _report([*problems, f"interpolation fails: {str(error).splitlines()[0]}"]) from None


# --- from values to dataclasses -------------------------------------------------------------------------


def _validated(
    kind: type[Section], tree: Mapping[str, Any], problems: list[str], places: Mapping[str, str]
) -> Section | None:
    try:
        # JSON mode: strict about types, yet a list is a tuple and an integer is a number.
        return TypeAdapter(kind).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += [_describe(detail, tree, places) for detail in error.errors()]
        return None


def _describe(detail: Any, tree: Mapping[str, Any], places: Mapping[str, str]) -> str:
    path, node = _locate(detail, tree)
    dotted = ".".join(path)
    place = next((places[p] for p in _upward(path) if p in places), "conf")
    if detail["type"] == "missing":
        return f"{place}: {dotted}: a value is required"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{place}: {dotted}: unknown name"
    message = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    expected = detail["ctx"]["expected"] if detail["type"] == "literal_error" else ""
    close = difflib.get_close_matches(str(node), [w.strip("' ") for w in re.split(r",| or ", expected)], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{place}: {dotted}: got {node!r}, must be {message}{hint}"


def _locate(detail: Any, tree: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Return the path in the tree and the value there: pydantic's location also holds union tags."""
    path: list[str] = []
    node: Any = tree
    for key in detail["loc"]:
        in_mapping = isinstance(node, Mapping) and key in node
        in_list = isinstance(node, list) and isinstance(key, int) and key < len(node)
        if in_mapping or in_list:
            node, path = node[key], [*path, str(key)]
        elif key == detail["loc"][-1] and detail["type"] in ("missing", "unexpected_keyword_argument"):
            path = [*path, str(key)]
    return path, node


def _upward(path: list[str]) -> Iterator[str]:
    for end in range(len(path), 0, -1):
        yield ".".join(path[:end])


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of {', '.join(sorted(known))}" if known else ""


def _report(problems: Sequence[str]) -> UserError:
    count = f"{len(problems)} mistakes" if len(problems) > 1 else "1 mistake"
    return UserError(f"configuration has {count}:\n" + "\n".join(f"  {p}" for p in dict.fromkeys(problems)))
