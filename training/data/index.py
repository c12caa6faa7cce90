"""The index beside a shard: where every sample lies, what it weighs, and how to know that it is intact.

In and out: JSON only. A folder of shards is

    dataset.json              every shard with its size and digests; published last, so a folder with it is complete
    train-000000.tar          plain ustar, any WebDataset tool reads it
    train-000000.index.json   one `Entry` per sample, offsets and CRC-32C included, and the SHA-256 of the tar

`Entry.counts` holds what the sample is made of, per modality: segments, bytes, seconds and cells (pixels, readings,
characters).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
SPLITS = ("train", "val", "test")
MAX_SAMPLE_BYTES = 256 * 2**20


class ShardError(OSError):
    """A shard or its index is truncated, corrupted or missing. The message names shard, sample key and byte offset."""


@dataclass(frozen=True)
class Member:
    """One file of a sample: `suffix` ("json", "0.png"), byte `offset` of its content in the tar, `size` in bytes."""

    suffix: str
    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """One sample: the bytes [offset, offset + size) of its shard, headers and padding included."""

    key: str
    offset: int
    size: int
    crc32c: int
    members: tuple[Member, ...]
    source: str = ""
    task: str = ""
    pair: str | None = None
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    """modality -> {"segments", "bytes", "seconds", "cells"}."""

    def to_json(self) -> dict[str, Any]:
        """Short lists, because a shard holds tens of thousands of entries."""
        value = asdict(self) | {"members": [[m.suffix, m.offset, m.size] for m in self.members]}
        return {k: v for k, v in value.items() if v not in (None, "", {})}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Entry:
        return Entry(**{**value, "members": tuple(Member(*m) for m in value["members"])})

    def cost(self) -> int:
        """A guess of the sample's tokens, only used to balance ranks: integers, so that every machine agrees."""
        per_cell = {"text": 0.25, "image": 1 / 256, "video": 1 / 1024, "audio": 1 / 640, "sensor": 1.0, "action": 1.0}
        return 1 + sum(int(c.get("cells", 0) * per_cell.get(m, 1.0)) + 4 * int(c["segments"]) for m, c in self.counts.items())


@dataclass(frozen=True)
class ShardIndex:
    """What `NAME.index.json` holds."""

    shard: str
    split: str
    size: int
    """Bytes of the tar."""
    sha256: str
    first_line: int
    last_line: int
    """First and last line (from 1) of the manifest that this shard answers for, refused documents included."""
    entries: tuple[Entry, ...]
    refused: tuple[dict[str, Any], ...] = ()
    """{"line", "document", "segment", "reason", "detail"} of every document left out of [first_line, last_line]."""

    def summary(self) -> dict[str, Any]:
        """Counts for a person and for `dataset.json`."""
        sources = Counter(e.source for e in self.entries)
        segments: Counter[str] = Counter()
        for entry in self.entries:
            segments.update({m: int(c["segments"]) for m, c in entry.counts.items()})
        return {
            "samples": len(self.entries),
            "sources": dict(sorted(sources.items())),
            "segments": dict(sorted(segments.items())),
        }

    def to_bytes(self) -> bytes:
        head = {
            "format": FORMAT,
            "shard": self.shard,
            "split": self.split,
            "bytes": self.size,
            "sha256": self.sha256,
            "first_line": self.first_line,
            "last_line": self.last_line,
            **self.summary(),
            "refused": list(self.refused),
            "entries": [e.to_json() for e in self.entries],
        }
        return (json.dumps(head, separators=(",", ":"), allow_nan=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> ShardIndex:
        """Parse and check: counts agree, keys are unique, samples lie side by side inside the shard."""
        try:
            value = json.loads(data)
            if value["format"] != FORMAT:
                raise ShardError(
                    f"{where} has index format {value['format']!r}, this weft reads {FORMAT}; run weft prepare again"
                )
            entries = tuple(Entry.from_json(e) for e in value["entries"])
            index = ShardIndex(
                shard=str(value["shard"]),
                split=str(value["split"]),
                size=int(value["bytes"]),
                sha256=str(value["sha256"]),
                first_line=int(value["first_line"]),
                last_line=int(value["last_line"]),
                entries=entries,
                refused=tuple(value["refused"]),
            )
            index._check(int(value["samples"]), where)
        except ShardError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ShardError(
                f"{where} is not a shard index ({type(error).__name__}: {error}); run weft prepare again"
            ) from error
        return index

    def _check(self, samples: int, where: str) -> None:
        if samples != len(self.entries):
            raise ShardError(f"{where} states {samples} samples and lists {len(self.entries)}; run weft prepare again")
        end = 0
        keys: set[str] = set()
        for entry in self.entries:
            if entry.key in keys:
                raise ShardError(f"{where} lists sample {entry.key} twice; run weft prepare again")
            keys.add(entry.key)
            inside = all(entry.offset < m.offset and m.offset + m.size <= entry.offset + entry.size for m in entry.members)
            if entry.offset != end or not inside or not 0 < entry.size <= MAX_SAMPLE_BYTES:
                raise ShardError(
                    f"{where}: sample {entry.key} at offset {entry.offset} does not follow the one before it at {end}"
                )
            end += entry.size
        if end > self.size:
            raise ShardError(f"{where}: samples end at byte {end}, the shard has {self.size}")


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` holds."""

    shards: tuple[dict[str, Any], ...]
    """{"shard", "split", "bytes", "sha256", "index_sha256", "samples", "sources", "segments"}."""
    digest: str
    """SHA-256 over the shards' names and digests: the name of this data in results and checkpoints."""
    refused: dict[str, int] = field(default_factory=dict)
    """Documents left out, per reason."""
    origin: str = ""
    """Digest of the manifest or the source it was made from."""

    @staticmethod
    def of(indexes: Iterable[tuple[ShardIndex, bytes]], refused: dict[str, int], origin: str) -> DatasetInfo:
        shards = []
        for index, data in indexes:
            digests = {"sha256": index.sha256, "index_sha256": hashlib.sha256(data).hexdigest()}
            shards.append({"shard": index.shard, "split": index.split, "bytes": index.size, **digests, **index.summary()})
        return DatasetInfo(tuple(shards), _digest(shards), dict(sorted(refused.items())), origin)

    def to_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> DatasetInfo:
        try:
            value = json.loads(data)
            if value.pop("format") != FORMAT:
                raise ShardError(f"{where} has another format than {FORMAT}; run weft prepare again")
            info = DatasetInfo(**{**value, "shards": tuple(value["shards"])})
            found = _digest(info.shards)
        except ShardError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ShardError(
                f"{where} is not a list of shards ({type(error).__name__}: {error}); run weft prepare again"
            ) from error
        if found != info.digest:
            raise ShardError(
                f"{where} was edited: its digest is {found[:12]}, it states {info.digest[:12]}; run weft prepare again"
            )
        return info


def _digest(shards: Iterable[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(list(shards), sort_keys=True).encode()).hexdigest()


def publish(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there in full or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
