"""Documents into shards: decoded once, refused with a reason, packed, resumable at any kill.

In: records of a manifest (or of an adapter in `sources`). Out: a folder of shards (`index`), `refused.jsonl`, a
`PrepareReport`.

Every split has its own shards. They fill in the order of the records, whatever the number of workers, so that a shard's
bytes are a function of the records alone. A shard answers for its split's records from `first_line` to `last_line`; a
start that finds finished shards continues after the last of them, and what an interrupted one left half-written is
thrown away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.training.data.check import about
from weft.training.data.decode_pool import DecodePool, WorkerFailure
from weft.training.data.index import SPLITS, DatasetInfo, ShardIndex, publish
from weft.training.data.records import Members, Record, Refused, explode, read_manifest
from weft.training.data.shards import ShardWriter, index_name

log = logging.getLogger(__name__)
IN_FLIGHT = 64
"""Documents whose media are being checked at one time, per worker."""
IN_FLIGHT_BYTES = 2**28


class PrepareError(ValueError):
    """The folder cannot be written: it holds something else, or no document could be used."""


@dataclass(frozen=True)
class Progress:
    """Handed to `progress` after every document."""

    records: int
    samples: int
    refused: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class PrepareReport:
    """What was made."""

    folder: str
    samples: dict[str, int]
    """Per split."""
    shards: int
    bytes: int
    refused: dict[str, int]
    """Documents left out, per reason; named in `refused.jsonl`."""
    first: dict[str, str]
    """Per reason, what was said of the first such document."""
    resumed_shards: int
    seconds: float
    digest: str


@dataclass
class _Split:
    """The open shard of one split."""

    name: str
    finished: list[ShardIndex] = field(default_factory=list)
    writer: ShardWriter | None = None
    refused: list[dict[str, Any]] = field(default_factory=list)
    first_line: int = 0
    last_line: int = 0


def prepare(
    manifest: str | Path,
    out_dir: str | Path,
    *,
    shard_bytes: int = 2**28,
    workers: int = 0,
    timeout_s: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Pack the documents of a JSONL manifest. A start with the same manifest and settings continues where a kill left it."""
    digest = hashlib.sha256()
    try:
        with open(manifest, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise PrepareError(f"manifest {manifest} cannot be read ({error.strerror}); check the path") from error
    return prepare_records(
        lambda: read_manifest(manifest),
        out_dir,
        origin=digest.hexdigest(),
        shard_bytes=shard_bytes,
        workers=workers,
        timeout_s=timeout_s,
        progress=progress,
    )


def prepare_records(
    records: Callable[[], Iterable[Record]],
    out_dir: str | Path,
    *,
    origin: str,
    shard_bytes: int = 2**28,
    workers: int = 0,
    timeout_s: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Pack any source of records. `origin` names its content: a start with another one in the same folder is refused."""
    if shard_bytes < 2**14:
        raise PrepareError(f"shard_bytes={shard_bytes} is too small; use at least {2**14} (256 MiB is usual)")
    folder, began = Path(out_dir), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"origin": origin, "shard_bytes": shard_bytes})
    splits = {name: _Split(name, _finished(folder, name)) for name in SPLITS}
    resumed = sum(len(s.finished) for s in splits.values())
    for split in splits.values():
        split.last_line = split.finished[-1].last_line if split.finished else 0
    state = _Packer(folder, splits, shard_bytes)
    count = 0
    with DecodePool(workers, timeout_s=timeout_s) as pool:
        try:
            for count, (record, outcome) in enumerate(_checked(records(), splits, pool), start=1):
                state.put(record, outcome)
                if progress is not None:
                    progress(Progress(count, state.samples, state.refused.total(), state.bytes, time.monotonic() - began))
        except BaseException:
            state.abandon()
            raise
    indexes = state.finish()
    if not any(len(i.entries) for i in indexes):
        first = next(iter(state.refusals()), {"detail": "the source has no documents"})
        raise PrepareError(f"no document of {count} could be used: {first['detail']}")
    data = [(i, (folder / index_name(i.shard)).read_bytes()) for i in indexes]
    info = DatasetInfo.of(data, dict(state.refused), origin)
    refusals = state.refusals()
    first = {r["reason"]: r["detail"] for r in reversed(refusals)}
    lines = "".join(json.dumps(r, sort_keys=True) + "\n" for r in refusals)
    publish(folder / "refused.jsonl", lines.encode())
    publish(folder / "dataset.json", info.to_bytes())
    samples = {s: sum(len(i.entries) for i in indexes if i.split == s) for s in SPLITS}
    return PrepareReport(
        str(folder),
        {s: n for s, n in samples.items() if n},
        len(indexes),
        sum(i.size for i in indexes),
        dict(sorted(state.refused.items())),
        first,
        resumed,
        time.monotonic() - began,
        info.digest,
    )


@dataclass(frozen=True)
class _Ready:
    """A document that may enter a shard."""

    members: Members
    about: dict[str, Any]
    counts: dict[str, dict[str, float]]


def _checked(
    records: Iterable[Record], splits: dict[str, _Split], pool: DecodePool
) -> Iterator[tuple[Record, _Ready | tuple[str, dict[str, Any]]]]:
    """Records in their order with what the check said, many being checked at one time."""
    waiting: deque[tuple[Record, dict[str, Any], Members, Future[Any]]] = deque()
    held = 0
    most = max(1, pool.workers * IN_FLIGHT)
    for record in records:
        split = "train"
        try:
            facts = about(record.spec, record.where)
            split = facts["split"]
            if record.line <= splits[split].last_line:
                continue
            stored, media = explode(record)
            text = json.dumps(stored, separators=(",", ":"), allow_nan=False, default=_plain).encode()
            members: Members = [("json", text), *media]
        except (Refused, ValueError, TypeError) as error:
            if record.line > splits[split].last_line:
                yield from _drain(waiting, 0)
                held = 0
                yield record, (split, _refusal(record, error))
            continue
        waiting.append((record, facts, members, _submit(pool, record, members)))
        held += sum(len(data) for _, data in members)
        if len(waiting) >= most or held > IN_FLIGHT_BYTES:
            before = len(waiting)
            yield from _drain(waiting, 0 if held > IN_FLIGHT_BYTES else before - max(1, pool.workers))
            held = sum(len(data) for item in waiting for _, data in item[2])
    yield from _drain(waiting, 0)


def _submit(pool: DecodePool, record: Record, members: Members) -> Future[Any]:
    header = {"members": [suffix for suffix, _ in members], "where": record.where}
    return pool.submit("check", header, [data for _, data in members])


def _drain(waiting: deque[tuple[Record, dict[str, Any], Members, Future[Any]]], leave: int) -> Iterator[Any]:
    while len(waiting) > leave:
        record, facts, members, future = waiting.popleft()
        try:
            answer = future.result()[0]
        except WorkerFailure as error:
            what = {"error": "unreadable media", "timeout": "timeout", "crash": "decoder crash"}[error.kind]
            yield record, (facts["split"], _refusal(record, Refused(what, f"{record.where}: {error}")))
            continue
        if "refused" in answer:
            found = answer["refused"]
            yield record, (facts["split"], _refusal(record, Refused(found["reason"], found["detail"], found["segment"])))
        else:
            yield record, _Ready(members, facts, answer["counts"])


def _refusal(record: Record, error: Exception) -> dict[str, Any]:
    reason = error.reason if isinstance(error, Refused) else "bad manifest"
    segment = error.segment if isinstance(error, Refused) else None
    detail = str(error) if str(error).startswith(record.where) else f"{record.where}: {error}"
    document = str(record.spec.get("id", ""))
    return {"line": record.line, "document": document, "segment": segment, "reason": reason, "detail": detail}


class _Packer:
    """Writes shards split by split and keeps the count of what was refused."""

    def __init__(self, folder: Path, splits: dict[str, _Split], shard_bytes: int) -> None:
        self.folder, self.splits, self.shard_bytes = folder, splits, shard_bytes
        done = [i for s in splits.values() for i in s.finished]
        self.samples = sum(len(i.entries) for i in done)
        self.bytes = sum(i.size for i in done)
        self.refused: Counter[str] = Counter(r["reason"] for i in done for r in i.refused)

    def put(self, record: Record, outcome: _Ready | tuple[str, dict[str, Any]]) -> None:
        """One document: into its split's shard, or onto the list of the refused."""
        if isinstance(outcome, tuple):
            split = self.splits[outcome[0]]
            split.refused.append(outcome[1])
            self.refused[outcome[1]["reason"]] += 1
            return
        split = self.splits[outcome.about["split"]]
        about = {k: v for k, v in outcome.about.items() if k != "split"}
        if split.writer is None:
            name = f"{split.name}-{len(split.finished):06d}.tar"
            split.first_line = split.last_line + 1
            split.writer = ShardWriter(self.folder, name, split.name)
        entry = split.writer.add(f"{record.line:09d}", outcome.members, counts=outcome.counts, **about)
        self.samples += 1
        self.bytes += entry.size
        split.last_line = record.line
        if split.writer.bytes >= self.shard_bytes:
            self._close(split)

    def finish(self) -> list[ShardIndex]:
        """Close the open shards; every index in the order of splits and numbers."""
        for split in self.splits.values():
            if split.writer is not None:
                split.last_line = max([split.last_line, *(r["line"] for r in split.refused)])
                self._close(split)
        return [i for s in self.splits.values() for i in s.finished]

    def refusals(self) -> list[dict[str, Any]]:
        """Every document left out, by line."""
        found = [r for s in self.splits.values() for i in s.finished for r in i.refused]
        found += [r for s in self.splits.values() for r in s.refused]
        return sorted(found, key=lambda r: r["line"])

    def abandon(self) -> None:
        """After an error: leave only whole shards."""
        for split in self.splits.values():
            if split.writer is not None:
                split.writer.abandon()

    def _close(self, split: _Split) -> None:
        assert split.writer is not None
        split.finished.append(split.writer.close(split.first_line, split.last_line, split.refused))
        split.writer, split.refused = None, []


def _plain(value: Any) -> Any:
    """numpy scalars in a manifest made by a program."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the folder is made from, or refuse if it is made from something else; drop what a kill left half-written."""
    mark = folder / "prepare.json"
    if mark.exists():
        try:
            found = json.loads(mark.read_text())
        except ValueError:
            found = None
        if found != settings:
            raise PrepareError(
                f"{folder} was prepared from another manifest or with other settings; choose a new folder or empty it"
            )
    elif any(folder.glob("*.tar")):
        raise PrepareError(f"{folder} holds tar files that weft prepare did not write; choose a new folder")
    else:
        publish(mark, (json.dumps(settings) + "\n").encode())
    for part in folder.glob("*.part"):
        part.unlink()


def _finished(folder: Path, split: str) -> list[ShardIndex]:
    """Whole shards of a split, up to the first one that is missing; a tar without its index is thrown away."""
    found: list[ShardIndex] = []
    while True:
        name = f"{split}-{len(found):06d}.tar"
        path = folder / index_name(name)
        if not path.exists():
            (folder / name).unlink(missing_ok=True)
            return found
        index = ShardIndex.from_bytes(path.read_bytes(), str(path))
        size = (folder / name).stat().st_size if (folder / name).exists() else -1
        if size != index.size:
            raise PrepareError(
                f"{folder / name} has {size} bytes, its index states {index.size}; delete the folder and prepare again"
            )
        found.append(index)
