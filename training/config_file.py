"""A run file and the command line as one tree of plain data, and where each of its values came from.

In: a YAML file and words such as `optimizer.lr=3e-4`. Out: the tree, and an `Origin` that names file and line (or the
override) of every key, for the messages of whoever uses it. Nothing is imported, constructed by name, or evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]


class ConfigError(ValueError):
    """A user's mistake in a config: one sentence that says where and how to repair it."""


@dataclass(frozen=True)
class Origin:
    """Where values came from, for messages."""

    file: str
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)
    """Keys that the command line set, and the words that did it."""

    def at(self, key: Key) -> str:
        """`run.yaml:7: optimizer.lr` or `override 'optimizer.lr=x': optimizer.lr`, as exact as the source allows."""
        dotted = ".".join(str(part) for part in key) or "the top level"
        for end in range(len(key), 0, -1):
            if key[:end] in self.overrides:
                return f"override {self.overrides[key[:end]]!r}: {dotted}"
            if key[:end] in self.lines:
                return f"{self.file}:{self.lines[key[:end]]}: {dotted}"
        return f"{self.file}: {dotted}"

    def replaced(self, key: Key, item: str) -> None:
        """`item` on the command line replaced what the file said of `key` and of everything below it."""
        for known in (self.lines, self.overrides):
            for other in [k for k in known if k[: len(key)] == key]:
                del known[other]  # type: ignore[attr-defined]
        self.overrides[key] = item


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Origin]:
    """Read one YAML mapping and the line of each of its keys. Duplicate keys are refused."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    lines: dict[Key, int] = {}
    if "&" in text and re.search(r"(^|[\s:\[{,-])\*\w", text):
        _no_aliases(text, path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _lines(node, (), lines, str(path))
        data = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply; a run file has three levels") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}); correct that line") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold key: value pairs, found {type(data).__name__}; start from a file in examples/")
    return data, Origin(str(path), lines)


def _no_aliases(text: str, path: Path) -> None:
    """An alias can stand for itself, or for a billion copies: a run file needs none."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise ConfigError(f"{path}:{line}: aliases (*{event.anchor}) are not read; write the value out")
    except yaml.YAMLError:
        return  # told by the caller, with its line


def _lines(node: Any, key: Key, lines: dict[Key, int], file: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{file}:{name.start_mark.line + 1}: a key must be a plain name")
            at = (*key, str(name.value))
            if at in lines:
                raise ConfigError(f"{file}:{name.start_mark.line + 1}: {'.'.join(map(str, at))} is given twice; keep one")
            lines[at] = name.start_mark.line + 1
            _lines(value, at, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*key, i)] = item.start_mark.line + 1
            _lines(item, (*key, i), lines, file)


def override(data: dict[str, Any], items: Sequence[str], origin: Origin | None = None) -> dict[str, Any]:
    """Apply dotted overrides such as `optimizer.lr=3e-4`; values are read as YAML. Returns a new tree.

    `origin` learns which keys the command line set, so that a later mistake in one names the override, not a line of the file.
    """
    result = _copy(data)
    for item in items:
        path, sign, text = item.removeprefix("--").partition("=")
        if not sign or not path:
            raise ConfigError(f"override {item!r} must look like optimizer.lr=3e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: {text!r} is not a YAML value ({error})") from error
        *parents, last = path.split(".")
        place: Any = result
        key: list[str | int] = []
        for depth, part in enumerate(parents):
            key.append(_index(place, part, item) if isinstance(place, list) else part)
            place = _descend(place, part, ".".join(parents[: depth + 1]), item)
        key.append(_index(place, last, item) if isinstance(place, list) else last)
        place[key[-1]] = value
        if origin is not None:
            origin.replaced(tuple(key), item)
    return result


def _descend(place: Any, part: str, path: str, item: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, item)]
    inner = place.setdefault(part, {})
    if inner is None:
        inner = place[part] = {}
    if not isinstance(inner, dict | list):
        raise ConfigError(f"override {item!r}: {path} is {inner!r}, which has no keys of its own")
    return inner


def _index(place: list[Any], part: str, item: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise ConfigError(f"override {item!r}: {part!r} must be a number from 0 to {len(place) - 1}")
    return int(part)


def _copy(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list | tuple) else data
