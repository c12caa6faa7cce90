"""Shards: documents as samples of plain ustar files, written in one go and read by offset.

In (writer): key and members (suffix, bytes) of each sample. Out: `NAME.tar`, which any WebDataset tool reads, and its index.
In (reader): a folder or URL with `dataset.json`, and a split. Out: samples by number, their bytes proven by CRC-32C.

A tar says nothing when bytes are missing or flipped, so nothing here relies on it: sizes and index digests are
compared when a dataset is opened, and every read compares the CRC of the whole sample, headers included.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.training.data.crc import crc32c
from weft.training.data.index import MAX_SAMPLE_BYTES, DatasetInfo, Entry, Member, ShardError, ShardIndex, publish, sync_folder
from weft.training.data.storage import RemoteStorage, Storage, open_storage

log = logging.getLogger(__name__)
KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
SUFFIX = re.compile(r"json|\d{1,6}(\.\d{1,6})?\.[a-z0-9]{2,5}")


def index_name(shard: str) -> str:
    """`train-000000.tar` -> `train-000000.index.json`."""
    return shard.removesuffix(".tar") + ".index.json"


def tar_member(name: str, data: bytes) -> bytes:
    """Header, content and padding of one regular file, with no clock, user or machine in it."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


class ShardWriter:
    """Writes `NAME.tar.part`; `close` publishes the shard by rename, then its index."""

    def __init__(self, folder: Path, shard: str, split: str) -> None:
        self.folder, self.shard, self.split = Path(folder), shard, split
        self._part = self.folder / f"{shard}.part"
        self._file = open(self._part, "wb")  # noqa: SIM115 (closed by `close` or `abandon`)
        self._sha = hashlib.sha256()
        self._entries: list[Entry] = []
        self._keys: set[str] = set()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: str, members: Sequence[tuple[str, bytes]], **about: Any) -> Entry:
        """Append one sample; `about` are the remaining fields of `Entry`."""
        if not KEY.fullmatch(key) or key in self._keys:
            raise ValueError(f"sample key {key!r} must be new in shard {self.shard} and match {KEY.pattern}")
        parts, table, at = [], [], 0
        for suffix, data in members:
            if not SUFFIX.fullmatch(suffix):
                raise ValueError(f"member suffix {suffix!r} of sample {key} must match {SUFFIX.pattern}")
            table.append(Member(suffix, self.bytes + at + 512, len(data)))
            parts.append(tar_member(f"{key}.{suffix}", data))
            at += len(parts[-1])
        data = b"".join(parts)
        if not 0 < len(data) <= MAX_SAMPLE_BYTES:
            raise ValueError(f"sample {key} has {len(data)} bytes, a sample holds 1 to {MAX_SAMPLE_BYTES}")
        entry = Entry(key, self.bytes, len(data), crc32c(data), tuple(table), **about)
        self._write(data)
        self._entries.append(entry)
        self._keys.add(key)
        return entry

    def close(self, first_line: int, last_line: int, refused: Sequence[dict[str, Any]] = ()) -> ShardIndex:
        """End the tar (two zero blocks, padded to a record of 10 KiB), publish it, then publish its index."""
        self._write(bytes(1024 + -(self.bytes + 1024) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.folder / self.shard)
        sync_folder(self.folder)
        index = ShardIndex(
            self.shard,
            self.split,
            self.bytes,
            self._sha.hexdigest(),
            first_line,
            last_line,
            tuple(self._entries),
            tuple(refused),
        )
        publish(self.folder / index_name(self.shard), index.to_bytes())
        return index

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.bytes += len(data)


@dataclass(frozen=True)
class Sample:
    """One intact sample: `members` maps a suffix ("json", "0.png") to its bytes."""

    where: str
    """Shard and key, as errors name it."""
    members: dict[str, bytes]


class ShardDataset:
    """One split of a folder of shards, by sample number. Thread-safe; holds the index in memory and no iterator state.

    `budget` is the share of samples that may be missing when the dataset is opened (a shard cut short by a bad copy). Within it
    the damage is logged and kept in `damaged`, and reading such a sample raises `ShardError`; beyond it opening does.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        split: str = "train",
        *,
        budget: float = 0.0,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 2**34,
    ) -> None:
        self.storage: Storage = open_storage(where, cache_dir=cache_dir, cache_bytes=cache_bytes)
        self.where, self.split = self.storage.where, split
        self.info = DatasetInfo.from_bytes(self._whole("dataset.json"), f"{self.where}/dataset.json")
        self.damaged: list[str] = []
        self.shards: list[ShardIndex] = []
        self._starts = [0]
        lost = 0
        for shard in self.info.shards:
            if shard["split"] == split:
                lost += self._add(shard)
        if not self.shards:
            have = ", ".join(f"{k} ({v})" for k, v in sorted(Counter(s["split"] for s in self.info.shards).items())) or "none"
            raise ShardError(f"{self.where} has no shard of split {split!r}; splits with shards: {have}")
        if lost > allowed(budget, len(self)) or (self.damaged and not budget):
            raise ShardError(f"{lost} of {len(self)} samples are lost: {'; '.join(self.damaged[:5])}; copy the shards again")
        for message in self.damaged:
            log.warning("%s", message)

    def _whole(self, name: str) -> bytes:
        try:
            return self.storage.whole(name)
        except ShardError as error:
            if name != "dataset.json":
                raise
            raise ShardError(f"{self.where} holds no dataset.json; finish weft prepare or check the path ({error})") from error

    def _add(self, stated: dict[str, Any]) -> int:
        name = f"{self.where}/{stated['shard']}"
        data = self._whole(index_name(stated["shard"]))
        if hashlib.sha256(data).hexdigest() != stated["index_sha256"]:
            raise ShardError(f"{name}: its index is not the one dataset.json names; copy the folder again or run weft prepare")
        index = ShardIndex.from_bytes(data, f"{self.where}/{index_name(stated['shard'])}")
        self.shards.append(index)
        self._starts.append(self._starts[-1] + len(index.entries))
        try:
            found = self.storage.size(stated["shard"])
        except ShardError as error:
            self.damaged.append(str(error))
            return len(index.entries)
        if found == index.size:
            return 0
        lost = sum(e.offset + e.size > found for e in index.entries)
        self.damaged.append(f"{name} has {found} bytes, its index states {index.size}: {lost} samples lost")
        return lost if found < index.size else len(index.entries)

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, number: int) -> tuple[ShardIndex, Entry]:
        """Shard and entry of sample `number`."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.where}")
        shard = bisect_right(self._starts, number) - 1
        return self.shards[shard], self.shards[shard].entries[number - self._starts[shard]]

    def entries(self) -> list[Entry]:
        """Every entry of the split, in order."""
        return [e for s in self.shards for e in s.entries]

    def name(self, number: int) -> str:
        """`folder/train-000000.tar:000000012`, as errors and the quarantine file call it."""
        shard, entry = self.locate(number)
        return f"{self.where}/{shard.shard}:{entry.key}"

    def read(self, number: int) -> Sample:
        """The members of one sample. Raises `ShardError` with shard, key and offset where a byte is not what was written."""
        shard, entry = self.locate(number)
        data = self.storage.read(shard.shard, entry.offset, entry.size)
        if crc32c(data) != entry.crc32c and isinstance(self.storage, RemoteStorage):
            self.storage.forget(shard.shard)
            data = self.storage.read(shard.shard, entry.offset, entry.size)
        if crc32c(data) != entry.crc32c:
            raise ShardError(
                f"{self.name(number)} at offset {entry.offset} is corrupted (CRC-32C differs); copy the shard again"
            )
        parts = {m.suffix: data[m.offset - entry.offset : m.offset - entry.offset + m.size] for m in entry.members}
        return Sample(self.name(number), parts)

    def verify(self) -> list[str]:
        """Read every shard in full and compare SHA-256; the names of those that differ, with the reason."""
        bad = []
        for shard in self.shards:
            try:
                sha = hashlib.sha256()
                for at in range(0, shard.size, 2**24):
                    sha.update(self.storage.read(shard.shard, at, min(2**24, shard.size - at)))
                if sha.hexdigest() != shard.sha256:
                    bad.append(f"{self.where}/{shard.shard}: SHA-256 differs from its index")
            except ShardError as error:
                bad.append(str(error))
        return bad


def allowed(budget: float, samples: int) -> int:
    """How many samples may be replaced: `budget` is their share; any budget above zero allows one."""
    if not 0 <= budget <= 1:
        raise ValueError(f"bad-sample budget {budget} must be a share from 0 to 1 (0.001 = 0.1 %)")
    return math.ceil(budget * samples)
