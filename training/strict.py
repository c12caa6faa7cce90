"""Plain data to frozen dataclasses, strictly: a tree of `config_file.py` in, one config object out.

Every mistake is a `ConfigError` that names the file, the line, the key, what was found, and the nearest legal key or value.
A config can only fill the fields that a dataclass declares.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from weft.training.config_file import ConfigError, Key, Origin

C = TypeVar("C")


def build(cls: type[C], data: Any, origin: Origin | None = None, key: Key = ()) -> C:
    """Fill the dataclass `cls` from plain data. Unknown key, missing key or wrong type raises `ConfigError`."""
    origin = origin or Origin("config", {})
    if not isinstance(data, dict):
        raise ConfigError(f"{origin.at(key)} must be a group of keys ({_names(cls)}), found {data!r}; {_as_group(cls, data)}")
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise ConfigError(f"{origin.at((*key, name))} is not a known key; {nearest(str(name), list(known))}")
    missing = [n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{origin.at(key)} needs {', '.join(missing)}; add it")
    values = {name: convert(hints[name], value, origin, (*key, name)) for name, value in data.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{origin.at(blamed(key, data, str(error)))}: {error}") from error


def _as_group(cls: type, data: Any) -> str:
    """How something that is no mapping is to be written."""
    if data is None:
        return "indent its keys below it or remove the line"
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    first = needed[0] if needed else next((f.name for f in fields(cls) if f.init), "key")  # type: ignore[arg-type]
    value = data if isinstance(data, str | int | float) else "..."
    return f"indent its keys below it, for example {first}: {value}"


def blamed(key: Key, given: Any, text: str) -> Key:
    """The given key that a rule's message names first, so that the error points to its line; else the group."""
    while isinstance(given, dict):
        places = {name: found.start() for name in given if (found := re.search(rf"\b{re.escape(str(name))}\b", text))}
        if not places:
            break
        name = min(places, key=lambda n: places[n])
        key, given = (*key, name), given[name]
    return key


def nearest(name: str, known: Sequence[str]) -> str:
    """The repair of a misspelt word: the one that it looks like, else all."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


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
            raise ConfigError(f"{origin.at(key)} must be a group of keys, found {value!r}; indent them below it")
        return {str(name): convert(get_args(hint)[1], inner, origin, (*key, name)) for name, inner in value.items()}
    if hint is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{origin.at(key)} must be a group of keys, found {value!r}; indent them below it")
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
        raise ConfigError(
            f"{origin.at(key)} must be a list, found {value!r}; write {key[-1]}: [...] or one `- ` line per entry"
        )
    if kind is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
        if len(value) != len(inner):
            raise ConfigError(f"{origin.at(key)} must have {len(inner)} entries, found {len(value)}; give all of them")
        return tuple(convert(t, v, origin, (*key, i)) for i, (t, v) in enumerate(zip(inner, value)))
    return kind(convert(inner[0], v, origin, (*key, i)) for i, v in enumerate(value))


WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}


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
    need = WORDS.get(hint, getattr(hint, "__name__", str(hint)))
    raise ConfigError(f"{origin.at(key)} must be {need}, found {value!r}; {_repair(hint, value, key)}")


def _repair(hint: Any, value: Any, key: Key) -> str:
    """How a value of the wrong type is to be written."""
    if value is None:
        return "give it a value or remove the line"
    if hint in (str, Path):
        return f"quote it: {key[-1]}: '{value}'"
    number = _number(value)
    if hint is int and number is not None and number == int(number) and not isinstance(value, bool):
        return f"write {key[-1]}: {int(number)}"
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return f"write {key[-1]}: {value.lower()}, without quotes"
    if hint is float and isinstance(value, str) and _number(value.replace(",", ".")) is not None:
        return f"write {key[-1]}: {value.replace(',', '.')}"
    examples = {int: "100", float: "0.5", bool: "true"}
    return f"write for example {key[-1]}: {examples.get(hint, '...')}"


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
