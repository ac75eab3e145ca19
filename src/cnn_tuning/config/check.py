"""From a tree of values to dataclasses, with pydantic; and how a mistake is told."""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from cnn_tuning.config.schema import Recipe
from cnn_tuning.errors import UserError

Section = TypeVar("Section")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Return the validator of a section; to build one takes longer than to use it a hundred times."""
    return TypeAdapter(kind)


def validated(
    kind: type[Section], tree: Mapping[str, Any], problems: list[str], places: Mapping[str, str]
) -> Section | None:
    """Return the tree as a dataclass; None, and its mistakes in `problems`, if it is not one."""
    try:
        # JSON mode: strict about types, yet a list is a tuple and an integer is a number.
        return _adapter(cast(Any, kind)).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += [_describe(detail, tree, places) for detail in error.errors()]
        return None


def mended(kind: type, tree: Mapping[str, Any], sound: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with its wrong values as they are in `sound`, so that the rest of it can be checked."""
    mended = copy.deepcopy(dict(tree))
    try:
        _adapter(cast(Any, kind)).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        for path in (_locate(detail, tree)[0] for detail in error.errors()):
            if path:
                _put_back(path, mended, sound)
    return mended


def _put_back(path: Sequence[str], tree: dict[str, Any], sound: Mapping[str, Any]) -> None:
    """Give the value at the path its value in `sound`, or take it out where that has none; a list is one value."""
    key, rest = path[0], path[1:]
    if rest and isinstance(tree.get(key), dict):
        inner = sound.get(key)
        _put_back(rest, tree[key], inner if isinstance(inner, Mapping) else {})
        return
    tree.pop(key, None)
    if key in sound:
        tree[key] = sound[key]


def check_backbone(recipe: Recipe) -> list[str]:
    """Return what is wrong between a network and how it is to be trained."""
    model = recipe.model
    problems = []
    if model.architecture != "backbone":
        for name, given in (("model.pretrained", model.pretrained), ("trainer.finetune", recipe.trainer.finetune)):
            if given:
                problems.append(f"{name}: only for model.architecture backbone, not {model.architecture}")
    elif model.pretrained and model.weights is None:
        problems.append("model.pretrained: true needs model.weights: {file: …, sha256: …, sources: […]}")
    return problems


def _describe(detail: Any, tree: Mapping[str, Any], places: Mapping[str, str]) -> str:
    path, node = _locate(detail, tree)
    dotted = ".".join(path)
    place = next((places[p] for p in _upward(path) if p in places), "conf")
    if detail["type"] == "missing":
        return f"{place}: {dotted}: a value is required"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{place}: {dotted}: unknown name"
    message = re.sub(r"^\w+ should ", "must ", detail["msg"]).replace("must be a valid ", "must be ")
    expected = detail["ctx"]["expected"] if detail["type"] == "literal_error" else ""
    words = [word.strip("' ") for word in re.split(r",| or ", expected) if word]
    close = difflib.get_close_matches(str(node), words, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{place}: {dotted}: got {node!r}, {message}{hint}"


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


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for a wrong name: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of {', '.join(sorted(known))}" if known else ""


def report(problems: Sequence[str]) -> UserError:
    """Return one error that lists every mistake."""
    told = list(dict.fromkeys(problems))
    count = f"{len(told)} mistakes" if len(told) > 1 else "1 mistake"
    return UserError(f"configuration has {count}:\n" + "\n".join(f"  {p}" for p in told))
