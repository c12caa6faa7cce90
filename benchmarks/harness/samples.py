"""Documents of a task as samples, in an order that depends on nothing but their content.

In: a manifest or a folder of shards. Out: `Sample`s whose media are read only when asked for. A line that is no document stays
a sample that raises when it is read, so that it is counted as failed. `data_digest` covers lines and media bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from weft.benchmarks.harness.task import Task, TaskError
from weft.tokenizers.manifest import ManifestError, load_document
from weft.tokenizers.segment import Document

MEDIA = ("image", "video", "audio", "sensor", "action")


@dataclass(frozen=True)
class Sample:
    """One document, not yet read."""

    key: str
    """Its id, unique within the task."""
    digest: str
    """SHA-256 of its line and media."""
    metadata: dict[str, Any]
    pair: str | None
    load: Callable[[], Document] = field(compare=False)

    def __lt__(self, other: Sample) -> bool:
        return (self.digest, self.key) < (other.digest, other.key)


def read_samples(where: Path, split: str) -> list[Sample]:
    """The samples behind a manifest or a folder of shards, sorted by content."""
    if where.is_dir():
        found = _from_shards(where, split)
    elif where.is_file():
        found = _from_manifest(where)
    else:
        raise TaskError(f"{where} does not exist; paths of a task count from --data, else from the folder of its file")
    if not found:
        raise TaskError(f"{where} holds no documents")
    return _unique(sorted(found))


def _unique(samples: list[Sample]) -> list[Sample]:
    """Give copies of one document keys of their own."""
    seen: dict[str, int] = {}
    out = []
    for sample in samples:
        count = seen.get(sample.key, 0)
        seen[sample.key] = count + 1
        key = f"{sample.key}#{count + 1}" if count else sample.key
        out.append(Sample(key, sample.digest, sample.metadata, sample.pair, sample.load))
    return out


def _from_manifest(path: Path) -> list[Sample]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a document is an object, this line is a {type(value).__name__}")
        except ValueError as error:
            digest = hashlib.sha256(line.encode()).hexdigest()
            found.append(Sample(f"line-{digest[:12]}", digest, {}, None, partial(_refuse, f"not a document: {error}")))
            continue
        digest = _digest(value, path.parent)
        about = value.get("metadata")
        found.append(
            Sample(
                str(value.get("id") or f"line-{digest[:12]}"),
                digest,
                about if isinstance(about, dict) else {},
                value.get("pair"),
                partial(load_document, value, path.parent),
            )
        )
    return found


def _refuse(reason: str) -> Document:
    raise ManifestError(reason)


def _digest(value: dict[str, Any], base: Path) -> str:
    """SHA-256 of a document's object and of the files that it names."""
    sha = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    segments = value.get("segments")
    for segment in segments if isinstance(segments, list) else []:
        for kind in MEDIA:
            name = segment.get(kind) if isinstance(segment, dict) else None
            if isinstance(name, str):
                path = base / name
                files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
                for file in files:
                    sha.update(_file_digest(file, *_age(file)) if file.is_file() else b"missing")
    return sha.hexdigest()


def _age(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


@lru_cache(maxsize=1 << 17)
def _file_digest(file: Path, size: int, changed_ns: int) -> bytes:
    """SHA-256 of a medium, which several tasks of a run name."""
    return hashlib.sha256(file.read_bytes()).digest()


def _from_shards(folder: Path, split: str) -> list[Sample]:
    from weft.training.data.records import restore
    from weft.training.data.shards import ShardDataset

    data = ShardDataset(folder, split)
    found = []
    for number in range(len(data)):
        try:
            sample = data.read(number)
            spec = json.loads(sample.members["json"])
        except (ValueError, OSError, KeyError) as error:
            digest = hashlib.sha256(data.name(number).encode()).hexdigest()
            found.append(Sample(data.name(number), digest, {}, None, partial(_refuse, str(error))))
            continue
        sha = hashlib.sha256()
        for suffix in sorted(sample.members):
            sha.update(sample.members[suffix])

        def read(number: int = number) -> Document:
            again = data.read(number)
            return restore(again.members, again.where)

        key = str(spec.get("id") or f"line-{sha.hexdigest()[:12]}")
        found.append(Sample(key, sha.hexdigest(), spec.get("metadata") or {}, spec.get("pair"), read))
    return found


def data_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over all samples; the order of lines in the file does not matter."""
    return hashlib.sha256("".join(sample.digest for sample in sorted(samples)).encode()).hexdigest()


@dataclass(frozen=True)
class TaskData:
    """What a task reads."""

    samples: list[Sample]
    pool: list[Sample]
    """Documents of the training split: demonstrations, majority, specialist."""
    gallery: list[Sample]
    judge: list[Sample]

    def digest(self) -> str:
        """SHA-256 of all of it."""
        parts = [data_digest(part) for part in (self.samples, self.pool, self.gallery, self.judge)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def task_data(task: Task, root: Path, limit: int | None = None) -> TaskData:
    """Open everything that a task names; `limit` takes so many questions by content. Raises `TaskError` for a missing file.

    A training document that is a test document too is neither shown nor learnt from.
    """
    data = task.data

    def some(name: str | None, split: str) -> list[Sample]:
        return read_samples(root / name, split) if name else []

    samples = some(data.manifest or data.shards, data.split)
    asked = {sample.digest for sample in samples}

    def unseen(name: str | None) -> list[Sample]:
        found = [sample for sample in some(name, "train") if sample.digest not in asked]
        if name and not found:
            raise TaskError(f"every document of {name} is asked in the test; name the training split")
        return found

    return TaskData(samples[:limit], unseen(data.train), some(data.gallery, data.split), unseen(task.judge))
