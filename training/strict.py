"""Plain data to frozen dataclasses, strictly: YAML file + dotted overrides in, one config object out.

Every mistake is a `ConfigError` that names the file, the line, the key, what was found, and the nearest legal key.
Nothing is imported, constructed by name, or evaluated: a config can only fill the fields that a dataclass declares.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

C = TypeVar("C")
Key = tuple[str | int, ...]


class ConfigError(ValueError):
    """A user's mistake in a config: one sentence that says where and how to repair it."""


@dataclass(frozen=True)
class Origin:
    """Where values came from, for messages."""

    file: str
    lines: dict[Key, int]

    def at(self, key: Key) -> str:
        """`run.yaml:7: optimizer.lr`, as exact as the source allows."""
        dotted = ".".join(str(part) for part in key) or "the top level"
        for end in range(len(key), 0, -1):
            if key[:end] in self.lines:
                return f"{self.file}:{self.lines[key[:end]]}: {dotted}"
        return f"{self.file}: {dotted}"


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
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _lines(node, (), lines, str(path))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}); correct that line") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold key: value pairs, found {type(data).__name__}; start from a file in examples/")
    return data, Origin(str(path), lines)


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


def override(data: dict[str, Any], items: Sequence[str]) -> dict[str, Any]:
    """Apply dotted overrides such as `optimizer.lr=3e-4`; values are read as YAML. Returns a new tree."""
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
        for depth, part in enumerate(parents):
            place = _descend(place, part, ".".join(parents[: depth + 1]), item)
        if isinstance(place, list):
            place[_index(place, last, item)] = value
        else:
            place[last] = value
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


def build(cls: type[C], data: Any, origin: Origin | None = None, key: Key = ()) -> C:
    """Fill the dataclass `cls` from plain data. Unknown key, missing key or wrong type raises `ConfigError`."""
    origin = origin or Origin("config", {})
    if not isinstance(data, dict):
        raise ConfigError(f"{origin.at(key)} must be a group of keys ({_names(cls)}), found {data!r}")
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {_names(cls)}"
            raise ConfigError(f"{origin.at((*key, name))} is not a known key; {hint}")
    missing = [n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{origin.at(key)} needs {', '.join(missing)}; add it")
    values = {name: convert(hints[name], value, origin, (*key, name)) for name, value in data.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{origin.at(key)}: {error}") from error


def _names(cls: type) -> str:
    return ", ".join(field.name for field in fields(cls) if field.init)  # type: ignore[arg-type]


def convert(hint: Any, value: Any, origin: Origin, key: Key) -> Any:
    """One value as the type `hint`, or `ConfigError`."""
    kind = get_origin(hint)
    if hint is Any:
        return value
    if kind in (Union, types.UnionType):
        return _union(hint, value, origin, key)
    if kind is Literal:
        if value not in get_args(hint) or isinstance(value, bool) != any(value is choice for choice in (True, False)):
            near = difflib.get_close_matches(str(value), [str(c) for c in get_args(hint)], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{origin.at(key)} must be one of {', '.join(map(repr, get_args(hint)))}, found {value!r}{hint_text}"
            )
        return value
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, origin, key)  # type: ignore[arg-type]
    if kind in (tuple, list):
        return _sequence(hint, value, origin, key)
    if kind is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{origin.at(key)} must be a mapping, found {value!r}")
        return {str(name): convert(get_args(hint)[1], inner, origin, (*key, name)) for name, inner in value.items()}
    if hint is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{origin.at(key)} must be a mapping, found {value!r}")
        return value
    return _scalar(hint, value, origin, key)


def _union(hint: Any, value: Any, origin: Origin, key: Key) -> Any:
    choices = get_args(hint)
    if value is None and type(None) in choices:
        return None
    rest = [choice for choice in choices if choice is not type(None)]
    errors: list[ConfigError] = []
    for choice in rest:
        try:
            return convert(choice, value, origin, key)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _sequence(hint: Any, value: Any, origin: Origin, key: Key) -> Any:
    kind, inner = get_origin(hint), get_args(hint)
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{origin.at(key)} must be a list, found {value!r}")
    if kind is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
        if len(value) != len(inner):
            raise ConfigError(f"{origin.at(key)} must have {len(inner)} entries, found {len(value)}")
        return tuple(convert(t, v, origin, (*key, i)) for i, (t, v) in enumerate(zip(inner, value)))
    return kind(convert(inner[0], v, origin, (*key, i)) for i, v in enumerate(value))


def _scalar(hint: Any, value: Any, origin: Origin, key: Key) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        number = _number(value)
        if number is not None:
            return number
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    name = getattr(hint, "__name__", str(hint))
    extra = "; quote it" if hint is str and value is not None else ""
    raise ConfigError(f"{origin.at(key)} must be {name}, found {value!r} ({type(value).__name__}){extra}")


def _number(value: Any) -> float | None:
    if isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A config as plain data that YAML and JSON can hold: the inverse of `build`."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
