"""Tables as records: one row is one document. Parquet files, and Arrow files as `datasets.save_to_disk` writes them.

Columns become segments in the order of the schema: strings text, HF images and audio ({bytes, path}) media, class
labels their names. `columns` maps column -> modality and then only those are read; a column of numbers needs it (sensor
or action).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.registry import REGISTRY
from weft.training.data.prepare import PrepareError
from weft.training.data.records import Record
from weft.training.data.source import MEDIA, Source, origin_of, sniff, split_of


def table_source(
    files: Sequence[Path], folder: Path, *, columns: Mapping[str, str] | None = None, name: str | None = None
) -> Source:
    """One document per row of every file, in the order of the files' names."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading Parquet and Arrow files needs pyarrow: pip install 'weft[data]'") from error
    title = name or folder.resolve().name

    def records() -> Iterator[Record]:
        line = 0
        for path in files:
            try:
                schema, batches = _open(path)
                plan = _columns(schema, columns, path)
                labels = _labels(schema)
                split = split_of(str(path.relative_to(folder))) or "train"
                for batch in batches(list(plan)):
                    for row in batch.to_pylist():
                        line += 1
                        yield _record(line, path, row, plan, labels, title, split)
            except (OSError, pyarrow.ArrowInvalid) as error:
                kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
                raise PrepareError(f"{path} is no readable {kind} file ({error}); copy it again") from error

    return Source(records, origin_of("parquet", files, name=title, columns=dict(columns or {})))


def _open(path: Path) -> tuple[Any, Callable[[list[str]], Iterator[Any]]]:
    """(schema, columns -> record batches of at most 64 rows)."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        return file.schema_arrow, lambda names: file.iter_batches(batch_size=64, columns=names)
    import pyarrow.ipc

    source = pyarrow.memory_map(str(path))
    try:
        stream = pyarrow.ipc.open_stream(source)
        parts: Any = stream
    except pyarrow.ArrowInvalid:  # the other of Arrow's two layouts
        stream = pyarrow.ipc.open_file(source)
        parts = (stream.get_batch(i) for i in range(stream.num_record_batches))

    def rows(names: list[str]) -> Iterator[Any]:
        for part in parts:
            part = part.select(names)
            for at in range(0, part.num_rows, 64):
                yield part.slice(at, 64)

    return stream.schema, rows


def _columns(schema: Any, columns: Mapping[str, str] | None, path: Path) -> dict[str, str]:
    """Column -> modality, or "media" where the bytes say which."""
    if columns is not None:
        known = [m.name for m in REGISTRY]
        for column, modality in columns.items():
            if column not in schema.names:
                raise PrepareError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
            if modality not in known:
                raise PrepareError(f"column {column!r} is mapped to {modality!r}; modalities are {', '.join(known)}")
        return dict(columns)
    found = {}
    labels = _labels(schema)
    for field in schema:
        kind = str(field.type)
        if kind in ("string", "large_string") or field.name in labels:
            found[field.name] = "text"
        elif kind in ("binary", "large_binary") or (kind.startswith("struct") and "bytes: binary" in kind):
            found[field.name] = "media"
    if not found:
        raise PrepareError(f"{path} has no column of text or media; map its columns with columns={{column: modality}}")
    return found


def _labels(schema: Any) -> dict[str, list[str]]:
    """Class names per label column, from the Hugging Face metadata of the schema."""
    data = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(data)["info"]["features"] if data else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {c: f["names"] for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}


def _record(
    line: int, path: Path, row: dict[str, Any], plan: Mapping[str, str], labels: Mapping[str, list[str]], title: str, split: str
) -> Record:
    where = f"{path} row {line}"
    blobs: dict[str, bytes] = {}
    segments: list[dict[str, Any]] = []
    for column, modality in plan.items():
        value = row[column]
        if value is None:
            continue
        if column in labels and isinstance(value, int):
            value = labels[column][value] if 0 <= value < len(labels[column]) else str(value)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if modality == "media" and isinstance(value, str):  # a file beside the table
            ending = Path(value).suffix.lower().lstrip(".")
            if ending not in MEDIA:
                wrong = f"{where}: column {column!r} names {value}, which is no {', '.join(MEDIA)}"
                return Record(line, where, {"id": str(line)}, error=wrong)
            segments.append({MEDIA[ending]: value})
            continue
        if isinstance(value, bytes):
            suffix = sniff(value)
            if suffix is None:
                return Record(
                    line, where, {"id": str(line)}, error=f"{where}: column {column!r} holds media of an unknown type"
                )
            reference = f"{column}.{suffix}"
            blobs[reference] = value
            segments.append({MEDIA[suffix] if modality == "media" else modality: reference})
        elif modality in ("sensor", "action"):
            segments.append({modality: np.asarray(value)})
        elif modality == "text":
            segments.append({"text": str(value)})
        else:
            segments.append({modality: value})
    spec = {"id": str(line), "source": title, "split": split, "segments": segments}
    return Record(line, where, spec, path.parent, blobs)
