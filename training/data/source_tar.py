"""Tar files in WebDataset layout, local or behind a URL, as records.

Files of one sample follow each other and share the name up to the first dot of the base name. Only regular files are
read, nothing is extracted. A tar carries no checksum, so a cut one is told by its missing end mark.
"""

from __future__ import annotations

import glob
import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from weft.training.data.index import MAX_SAMPLE_BYTES
from weft.training.data.prepare import PrepareError
from weft.training.data.records import Record
from weft.training.data.source import Source, origin_of, sample_record, split_of
from weft.training.data.storage import open_remote


def tar_source(where: str, *, name: str | None = None) -> Source:
    """`shards/*.tar`, `shards/{000..013}.tar`, or the same behind any scheme that fsspec knows."""
    files = expand(where)
    title = name or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(where).parent.name or "tar").strip("-")

    def records() -> Iterator[Record]:
        line = 0
        for file in files:
            split = split_of(file) or "train"
            for key, members in _samples(file):
                line += 1
                media = {suffix: f"{Path(key).name}.{suffix}" for suffix in members}
                blobs = {media[suffix]: data for suffix, data in members.items()} | members
                yield sample_record(line, f"{file}:{key}", key, title, split, media, blobs)

    return Source(records, origin_of("tar", files, name=title))


def expand(where: str) -> list[str]:
    """Brace ranges ({000..013}), brace lists ({a,b}) and, for local paths, shell wildcards."""
    parts = re.split(r"\{([^{}]*)\}", where)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    paths = ["".join(chosen) for chosen in itertools.product(*choices)]
    if "://" not in where:
        paths = [found for path in paths for found in (sorted(glob.glob(path)) or [path])]
        missing = [path for path in paths if not Path(path).is_file()]
        if missing:
            raise PrepareError(f"{missing[0]} does not exist; check the path or the braces of {where}")
    return paths


def _choices(text: str) -> list[str]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = found.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return text.split(",")


def _samples(file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one tar, here or behind a URL."""
    try:
        with _open(file) as stream:
            yield from samples(stream, file)
    except OSError as error:
        raise PrepareError(f"{file} cannot be read ({error}); check the address and the access") from error


def _open(file: str) -> BinaryIO:
    if "://" in file:
        system, path = open_remote(file)
        return system.open(path, "rb")  # type: ignore[no-any-return]
    return open(file, "rb")


class _Tail(io.RawIOBase):
    """Passes bytes through and remembers the last 1,024."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.tail, self.total = stream, b"", 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data = self.stream.read(-1 if size is None else size)
        self.tail = (self.tail + data)[-1024:]
        self.total += len(data)
        return data


def samples(stream: BinaryIO, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {suffix: bytes}) of each sample. Raises `PrepareError` where the tar is cut or holds what it must not."""
    tail = _Tail(stream)
    key, used = "", 0
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=tail, mode="r|") as tar:  # type: ignore[call-overload]
            for info in tar:
                if info.isdir():
                    continue
                if not info.isreg():
                    raise PrepareError(f"{name}: {info.name!r} is no regular file; pack the shard with regular files only")
                folder, _, base = info.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                found = f"{folder}/{stem}" if folder else stem
                if not dot or not stem:
                    continue
                if found != key:
                    if members:
                        yield key, members
                    key, members, used = found, {}, 0
                used += info.size
                if used > MAX_SAMPLE_BYTES:
                    raise PrepareError(f"{name}: sample {key} is larger than {MAX_SAMPLE_BYTES} bytes; cut it")
                if suffix.lower() in members:
                    raise PrepareError(
                        f"{name}: sample {key} has {suffix} twice (whatever the case); give every sample its own key"
                    )
                file = tar.extractfile(info)
                data = file.read() if file else b""
                if len(data) != info.size:
                    raise PrepareError(f"{name} is truncated in {info.name}; copy it again")
                members[suffix.lower()] = data
            while tail.read(2**20):
                pass
    except tarfile.TarError as error:
        raise PrepareError(f"{name} is no readable tar ({error}); copy it again") from error
    if tail.tail.strip(b"\0") or len(tail.tail) < 1024:
        raise PrepareError(f"{name} ends without the end mark of a tar after {tail.total} bytes: it was cut; copy it again")
    if members:
        yield key, members
