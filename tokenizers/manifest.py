"""Documents as JSON: one object with segments that name files beside it, or hold small values in place.

In: a JSON object and the folder its paths count from. Out: a `Document` (media are not opened here, but for .npy arrays), and
back. Paths are relative and stay inside the folder unless `allow_outside` says otherwise. Keys: docs/interfaces.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.clock import to_ns
from weft.tokenizers.numbers import Names, csv_table
from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Segment, Sensor, Text, Video

DOCUMENT_KEYS = ("id", "split", "source", "pair", "metadata", "segments")
COMMON_KEYS = ("start_s", "start_ns", "start", "role", "name")
CLOCK_KEYS = ("rate_hz", "times_s", "times_ns")
KEYS: dict[str, tuple[str, ...]] = {
    "text": (),
    "image": (),
    "video": CLOCK_KEYS,
    "audio": ("rate_hz",),
    "sensor": (*CLOCK_KEYS, "channels", "units", "kind"),
    "action": (*CLOCK_KEYS, "space"),
}
ROLES = ("observed", "target", "either")


class ManifestError(ValueError):
    """A manifest that does not say what a document needs."""


def load_document(value: Mapping[str, Any], base_dir: str | Path = ".", allow_outside: bool = False) -> Document:
    """A document from its JSON object. Raises ManifestError naming document, segment and key."""
    if not isinstance(value, Mapping):
        raise ManifestError(f"a document is a JSON object, got {type(value).__name__}")
    where = f"document {value['id']!r}" if value.get("id") else "document"
    _known(value, DOCUMENT_KEYS, where)
    segments = value.get("segments")
    if not isinstance(segments, list):
        raise ManifestError(f"{where}: key 'segments' must be a list of objects, got {type(segments).__name__}")
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ManifestError(f"{where}: key 'metadata' must be an object, got {type(metadata).__name__}")
    for key in ("id", "split", "source", "pair"):
        if value.get(key) is not None and not isinstance(value[key], str):
            raise ManifestError(f"{where}: key {key!r} must be a string, got {value[key]!r}")
    split = {} if value.get("split") is None else {"split": value["split"]}
    base = Path(base_dir)
    return Document(
        segments=tuple(_segment(s, base, allow_outside, f"{where}, segments[{i}]") for i, s in enumerate(segments)),
        id=value.get("id") or "",
        source=value.get("source") or "",
        pair=value.get("pair"),
        metadata=dict(metadata) | split,
    )


def read_manifest(path: str | Path, allow_outside: bool = False) -> Iterator[Document]:
    """The documents of a file: one JSON object, a list of them, or one object per line (.jsonl)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read as a manifest ({error}); give a JSON file in UTF-8") from error
    for line, value in _objects(path, text):
        try:
            yield load_document(value, path.parent, allow_outside)
        except ManifestError as error:
            raise ManifestError(f"{path}{line}: {error}") from error


def _objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold U+2028, which splitlines() cuts at
            if line.strip():
                yield f" line {number}", _json(path, line, number)
        return
    value = _json(path, text, None)
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        yield f" [{i}]" if isinstance(value, list) else "", item


def _json(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = "" if line is None else f" line {line}"
        raise ManifestError(f"{path}{at} is not JSON ({error}); one object per file, or per line in a .jsonl file") from error


def _segment(value: Any, base: Path, outside: bool, where: str) -> Segment:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{where} must be an object such as {{'text': '...'}}, got {type(value).__name__}")
    kinds = [key for key in KEYS if key in value]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise ManifestError(f"{where} needs exactly one of the keys {', '.join(KEYS)}; found {found}")
    kind = kinds[0]
    _known(value, (kind, *COMMON_KEYS, *KEYS[kind]), f"{where} ({kind})")
    where = f"{where} ({kind})"
    common: dict[str, Any] = {"start": _start(value, where), "role": value.get("role", "either"), "name": value.get("name")}
    if common["role"] not in ROLES:
        raise ManifestError(f"{where}: key 'role' must be one of {', '.join(ROLES)}, got {common['role']!r}")
    if common["name"] is not None and not isinstance(common["name"], str):
        raise ManifestError(f"{where}: key 'name' must be a string, got {common['name']!r}")
    media = value[kind]
    if kind == "text":
        if not isinstance(media, str):
            raise ManifestError(f"{where}: key 'text' must be a string, got {type(media).__name__}")
        return Text(text=media, **common)
    if kind == "image":
        return Image(pixels=_path(media, base, outside, where), **common)
    if kind == "audio":
        return Audio(samples=_media(media, base, outside, where), rate_hz=_rate(value, where), **common)
    clock: dict[str, Any] = {"rate_hz": _rate(value, where), "times": _times(value, where)}
    if kind == "video":
        return Video(frames=_media(media, base, outside, where), **clock, **common)
    values, *heads = _values(media, base, outside, where, kind)
    if kind == "sensor":
        names: dict[str, Any] = {k: _names(value, k, where) or own for k, own in zip(("channels", "units"), heads)}
        label = value.get("kind", "default")
        if not isinstance(label, str):
            raise ManifestError(f"{where}: key 'kind' must be a string, got {label!r}")
        return Sensor(values=values, kind=label, **names, **clock, **common)
    return Action(values=values, space=_space(value.get("space"), where), **clock, **common)


def _known(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(value) - set(known), key=str)
    if unknown:
        raise ManifestError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _start(value: Mapping[str, Any], where: str) -> int | None:
    """ns, from start_s (seconds), start_ns (integer) or start (ISO 8601 with a zone)."""
    given = [key for key in ("start_s", "start_ns", "start") if value.get(key) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ManifestError(f"{where}: {' and '.join(given)} both say when it starts; keep one")
    key, time = given[0], value[given[0]]
    if key == "start_ns":
        if isinstance(time, bool) or not isinstance(time, int):
            raise ManifestError(f"{where}: key 'start_ns' must be an integer of nanoseconds, got {time!r}")
        return to_ns(time, f"{where}, start_ns")
    if key == "start_s":
        return to_ns(_number(time, "start_s", where), f"{where}, start_s")
    try:
        return to_ns(datetime.fromisoformat(time), f"{where}, start")
    except TypeError as error:
        raise ManifestError(f"{where}: key 'start' must be a date such as '2026-01-31T12:00:00Z', got {time!r}") from error
    except ValueError as error:
        raise ManifestError(f"{where}: key 'start' = {time!r}: {error}; for example '2026-01-31T12:00:00Z'") from error


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ManifestError(f"{where}: key {key!r} must be a number, got {value!r}")
    return float(value)


def _rate(value: Mapping[str, Any], where: str) -> float | None:
    return None if value.get("rate_hz") is None else _number(value["rate_hz"], "rate_hz", where)


def _times(value: Mapping[str, Any], where: str) -> tuple[int | float, ...] | None:
    given = [key for key in ("times_s", "times_ns") if value.get(key) is not None]
    if not given:
        return None
    key, times = given[0], value[given[0]]
    if len(given) > 1 or not isinstance(times, list):
        raise ManifestError(f"{where}: give one of times_s and times_ns, as a list of numbers")
    if key == "times_s":
        return tuple(_number(time, f"times_s[{i}]", where) for i, time in enumerate(times))
    if any(isinstance(time, bool) or not isinstance(time, int) for time in times):
        raise ManifestError(f"{where}: key 'times_ns' must hold integers")
    return tuple(times)


def _names(value: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | None:
    names = value.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ManifestError(f"{where}: key {key!r} must be a list of strings, got {names!r}")
    return tuple(names)


def _space(value: Any, where: str) -> ActionSpace:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{where}: key 'space' must be {{'n': 4}} or {{'low': [..], 'high': [..]}}, got {value!r}")
    _known(value, ("n", "low", "high"), f"{where}, space")
    try:
        low, high = (None if value.get(k) is None else tuple(float(v) for v in value[k]) for k in ("low", "high"))
        return ActionSpace(n=value.get("n"), low=low, high=high)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{where}: key 'space': {error}") from error


def _path(value: Any, base: Path, outside: bool, where: str) -> Path:
    """A file or folder under `base`."""
    if not isinstance(value, str) or not value or "\x00" in value:
        raise ManifestError(f"{where} must name a file, got {value!r}")
    if value == ".":
        return base
    path = base / value
    if not outside:
        inside = base.resolve()
        if Path(value).is_absolute() or not path.resolve().is_relative_to(inside):
            raise ManifestError(f"{where}: path {value!r} leaves the folder of the manifest; move the file there or allow it")
    if not path.exists():
        raise ManifestError(f"{where}: {path} does not exist; paths count from the folder of the manifest")
    return path


def _media(value: Any, base: Path, outside: bool, where: str) -> Any:
    """A path, or the array of a .npy file."""
    path = _path(value, base, outside, where)
    return _array(path, where) if path.suffix == ".npy" else path


def _array(path: Path, where: str) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{where}: {path} is no readable .npy array ({error}); save it with numpy.save") from error


def _values(value: Any, base: Path, outside: bool, where: str, kind: str) -> tuple[np.ndarray, Names, Names]:
    """Numbers [N] or [N channels] in place (null = missing), from a .npy file, or with names and units from a .csv file."""
    if isinstance(value, str):
        path = _path(value, base, outside, where)
        if path.suffix == ".npy":
            return _array(path, where), None, None
        if path.suffix.lower() != ".csv":
            raise ManifestError(f"{where}: {path.name} must be a .npy array, a .csv table or a list of numbers in place")
        try:
            array, channels, units = csv_table(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ManifestError(
                f"{where}: {path} is no table of numbers ({error}); save it as numbers between commas"
            ) from error
        return _whole(array, kind), channels, units
    if not isinstance(value, list):
        raise ManifestError(f"{where}: key {kind!r} must be a list of numbers or the path of a .npy file, got {value!r}")
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{where}: key {kind!r} must hold numbers, each reading with as many as the first") from error
    return _whole(array, kind), None, None


def _whole(array: np.ndarray, kind: str) -> np.ndarray:
    """Actions that are all integers as integers."""
    whole = kind == "action" and np.isfinite(array).all() and (array == np.floor(array)).all()
    return array.astype(np.int64) if whole else array


# -- and back


def document_to_json(document: Document, base_dir: str | Path = ".") -> dict[str, Any]:
    """The JSON object of a document whose media are files under `base_dir`; readings and actions are written in place."""
    metadata = dict(document.metadata)
    value: dict[str, Any] = {"id": document.id, "source": document.source, "pair": document.pair}
    value["split"] = metadata.pop("split", None)
    value["metadata"] = metadata
    value = {key: item for key, item in value.items() if item not in ("", None, {})}
    segments = [_segment_to_json(segment, Path(base_dir), i) for i, segment in enumerate(document.segments)]
    return value | {"segments": segments}


def _segment_to_json(segment: Segment, base: Path, index: int) -> dict[str, Any]:
    where = f"segments[{index}] ({segment.modality})"
    if segment.modality not in KEYS:
        raise ManifestError(f"{where}: manifests know {', '.join(KEYS)}")
    own = [f.name for f in fields(segment) if f.name not in ("start", "role", "name")]
    content = getattr(segment, own[0])
    value: dict[str, Any] = {segment.modality: _content_to_json(segment, content, base, where)}
    if segment.start is not None:
        value["start_ns"] = to_ns(segment.start, where)
    if segment.role != "either":
        value["role"] = segment.role
    if segment.name is not None:
        value["name"] = segment.name
    for key in own[1:]:
        item = getattr(segment, key)
        if item is None or (key == "kind" and item == "default"):
            continue
        if key == "times":
            value["times_ns"] = [to_ns(time, f"{where}, times") for time in item]
        elif key == "space":
            value["space"] = {k: v for k, v in vars(item).items() if v is not None}
            value["space"] = {k: list(v) if isinstance(v, tuple) else v for k, v in value["space"].items()}
        else:
            value[key] = list(item) if isinstance(item, tuple) else item
    return value


def _content_to_json(segment: Segment, content: Any, base: Path, where: str) -> Any:
    if segment.modality == "text":
        return content
    if isinstance(content, (str, Path)):
        path = Path(content).resolve()
        if not path.is_relative_to(base.resolve()):
            raise ManifestError(f"{where}: {content} lies outside {base}; copy it there first")
        return path.relative_to(base.resolve()).as_posix()
    if segment.modality in ("sensor", "action"):
        array = np.asarray(content)
        if array.dtype.kind not in "iufb":
            raise ManifestError(f"{where}: values are {array.dtype}, numbers are needed")
        infinite = array.dtype.kind == "f" and np.isinf(array).any()
        if infinite:
            raise ManifestError(f"{where}: JSON has no infinite numbers; clip them or keep a .npy file")
        return [_plain(row) for row in array.tolist()]
    raise ManifestError(f"{where} is held in memory; write it to a file under {base} and give its path")


def _plain(value: Any) -> Any:
    """NaN as null."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


__all__ = ["KEYS", "ManifestError", "document_to_json", "load_document", "read_manifest"]
