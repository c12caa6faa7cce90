"""YAML as plain values that remember their lines, and dataclasses built from them strictly.

In: a YAML file (safe: no tags, no objects, no duplicate keys) and a dataclass. Out: the dataclass; every complaint names file,
line, what was found and what to write instead. Nothing is imported or executed from a file.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

Made = TypeVar("Made")


class TaskError(ValueError):
    """A task file that does not say what is needed."""


class Node:
    """One value of a YAML file: `value` is a scalar, a list of nodes or a dict of nodes."""

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where

    def plain(self) -> Any:
        """Without lines."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value

    def error(self, text: str) -> TaskError:
        """A complaint about this value."""
        return TaskError(f"{self.where}: {text}")


def read_yaml(path: str | Path) -> Node:
    """The one document of a file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        _no_aliases(text, path)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            return _node(tree, path)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read ({error}); give a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise TaskError(
            f"{path}{line} is not YAML ({getattr(error, 'problem', error)}); check indentation and quotes"
        ) from None
    except RecursionError:
        raise TaskError(f"{path} is nested too deeply; a task has four levels") from None
    raise TaskError(f"{path} is empty; a task file needs at least name, data, answer and metrics")


def _no_aliases(text: str, path: Path) -> None:
    """An alias can stand for itself, or for a billion copies: a task needs none."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise TaskError(
                f"{path} line {event.start_mark.line + 1}: aliases (*{event.anchor}) are not read; write the value out"
            )


def _node(tree: yaml.Node, path: Path) -> Node:
    where = f"{path} line {tree.start_mark.line + 1}"
    if not tree.tag.startswith("tag:yaml.org,2002:") or "python" in tree.tag:
        raise TaskError(f"{where}: the tag {tree.tag!r} is refused; write plain values, task files hold data only")
    if isinstance(tree, yaml.SequenceNode):
        return Node([_node(item, path) for item in tree.value], where)
    if isinstance(tree, yaml.MappingNode):
        found: dict[Any, Node] = {}
        for key, value in tree.value:
            if not isinstance(key, yaml.ScalarNode):
                raise TaskError(f"{path} line {key.start_mark.line + 1}: a key must be a plain name")
            name = _scalar(key, path)
            if name in found:
                raise TaskError(f"{path} line {key.start_mark.line + 1}: key {name!r} is written twice; keep one")
            found[name] = _node(value, path)
            found[name].where = f"{path} line {key.start_mark.line + 1}"
        return Node(found, where)
    return Node(_scalar(tree, path), where)


def _scalar(tree: yaml.Node, path: Path) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(tree)
    except yaml.YAMLError:
        line = tree.start_mark.line + 1
        raise TaskError(
            f"{path} line {line}: the tag {tree.tag!r} is refused; write plain values, task files hold data only"
        ) from None


def build(kind: type[Made], node: Node, what: str) -> Made:
    """A dataclass from a mapping: unknown and missing keys are errors, types are checked, rules of `__post_init__` apply."""
    if not isinstance(node.value, dict):
        raise node.error(f"{what} must be a mapping with the keys {', '.join(f.name for f in fields(kind))}")  # type: ignore[arg-type]
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in node.value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            repair = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise node.value[key].error(f"{what} has no key {key!r}; {repair}")
    hints = typing.get_type_hints(kind)
    values = {key: convert(hints[key], item, f"{what}.{key}") for key, item in node.value.items()}
    for name, about in known.items():
        if name not in values and about.default is MISSING and about.default_factory is MISSING:
            raise node.error(f"{what} lacks the key {name!r}; add it")
    try:
        return kind(**values)
    except TaskError as error:
        raise node.error(str(error)) from None


def convert(hint: Any, node: Node, what: str) -> Any:
    """A value of the type that a field states."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(inner, node, what)
    if is_dataclass(hint):
        return build(typing.cast(type, hint), node, what)
    if origin is Literal:
        if node.value not in inner:
            raise node.error(f"{what} is {node.value!r}; it must be one of {', '.join(map(str, inner))}")
        return node.value
    if origin is tuple:
        if not isinstance(node.value, list):
            raise node.error(f"{what} must be a list, got {node.value!r}; write [a, b]")
        return tuple(convert(inner[0], item, f"{what}[{i}]") for i, item in enumerate(node.value))
    if origin is dict or origin is Mapping:
        if not isinstance(node.value, dict):
            raise node.error(f"{what} must be a mapping, got {node.value!r}")
        return {
            convert(inner[0], Node(key, item.where), what): convert(inner[1], item, f"{what}.{key}")
            for key, item in node.value.items()
        }
    if hint is Any:
        return node.plain()
    return _simple(hint, node, what)


def _one_of(options: tuple[Any, ...], node: Node, what: str) -> Any:
    if node.value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(option, node, what)
        except TaskError as error:
            errors.append(error)
    raise errors[-1]


def _simple(hint: Any, node: Node, what: str) -> Any:
    value = node.value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    shown = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    raise node.error(f"{what} must be of type {hint.__name__}, got {shown}")
