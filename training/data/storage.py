"""Bytes by (name, offset, size) from a local folder (`os.pread`) or any fsspec URL through a bounded cache on local disk.

Nothing is extracted and no link is followed out of the folder: the names come from `dataset.json` and are checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from weft.training.data.index import ShardError

PAUSES_S = (0.2, 1.0)
"""Between three attempts to read over a network."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,180}(\.[a-z0-9]{1,20}){1,2}")


class Storage(Protocol):
    """Where shards lie."""

    where: str

    def size(self, name: str) -> int: ...

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, or `ShardError`."""
        ...

    def whole(self, name: str) -> bytes: ...


def open_storage(where: str | os.PathLike[str], *, cache_dir: str | Path | None = None, cache_bytes: int = 2**34) -> Storage:
    """A folder, or a URL with a scheme fsspec knows (s3://, gs://, https://, memory://)."""
    text = os.fspath(where)
    if "://" in text:
        return RemoteStorage(text, cache_dir=cache_dir, cache_bytes=cache_bytes)
    return LocalStorage(text)


def open_remote(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL; what is missing to read it is said with its repair."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise ModuleNotFoundError(
            f"{scheme}:// needs a package that is missing ({error}); pip install 'fsspec[{scheme.replace('https', 'http')}]'"
        ) from error
    except ValueError as error:
        raise ShardError(f"{url}: {error}; use a scheme that fsspec knows, such as https, s3, gs, file") from error


def checked_name(name: str) -> str:
    """A plain file name: no folder, no `..`."""
    if not NAME.fullmatch(name):
        raise ShardError(f"{name!r} is not a shard or index name (letters, digits, - and _, then a suffix)")
    return name


class LocalStorage:
    """Shards in a folder; at most `max_open` files are held open."""

    def __init__(self, folder: str, max_open: int = 256) -> None:
        self.where = folder
        self._max_open = max_open
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def size(self, name: str) -> int:
        try:
            return os.stat(os.path.join(self.where, checked_name(name))).st_size
        except OSError as error:
            raise ShardError(f"{self.where}/{name} cannot be read ({error.strerror}); copy the folder again") from error

    def read(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:  # held during the read, so that no other thread closes the file meanwhile
            try:
                data = os.pread(self._open(name), size, offset)
                while len(data) < size and (more := os.pread(self._open(name), size - len(data), offset + len(data))):
                    data += more
            except OSError as error:
                raise ShardError(f"{self.where}/{name} cannot be read at offset {offset} ({error.strerror})") from error
        if len(data) != size:
            raise ShardError(f"{self.where}/{name} is truncated: {size} bytes at offset {offset} needed, {len(data)} found")
        return data

    def whole(self, name: str) -> bytes:
        return self.read(name, 0, self.size(name))

    def _open(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            self._files[name] = os.open(os.path.join(self.where, checked_name(name)), os.O_RDONLY)
            while len(self._files) > self._max_open:
                os.close(self._files.popitem(last=False)[1])
        return self._files[name]

    def __del__(self) -> None:
        for handle in getattr(self, "_files", {}).values():
            os.close(handle)


class RemoteStorage:
    """Shards behind fsspec. Blocks of `block_bytes` are kept on local disk, the least recently used go first."""

    def __init__(
        self, url: str, *, cache_dir: str | Path | None = None, cache_bytes: int = 2**34, block_bytes: int = 4 * 2**20
    ) -> None:
        self.where = url.rstrip("/")
        self._fs, self._root = open_remote(self.where)
        self._temporary = None if cache_dir else tempfile.TemporaryDirectory(prefix="weft-shards-")
        self.folder = Path(cache_dir or self._temporary.name) / hashlib.sha256(self.where.encode()).hexdigest()[:16]  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        if block_bytes < 1 or cache_bytes < block_bytes:
            raise ValueError(f"cache_bytes={cache_bytes} must hold at least one block of {block_bytes} bytes")
        self._limit, self._block = cache_bytes, block_bytes
        self._lock = threading.RLock()
        known = sorted(self.folder.glob("*.block"), key=lambda p: p.stat().st_mtime_ns)
        self._kept = OrderedDict((p.name, p.stat().st_size) for p in known)
        self._bytes = sum(self._kept.values())
        self._sizes: dict[str, int] = {}

    def size(self, name: str) -> int:
        if name not in self._sizes:
            self._sizes[name] = int(self._ask(name, self._fs.size))
        return self._sizes[name]

    def read(self, name: str, offset: int, size: int) -> bytes:
        first, last = offset // self._block, (offset + max(size, 1) - 1) // self._block
        with self._lock:
            data = b"".join(self._get(name, i) for i in range(first, last + 1))
        start = offset - first * self._block
        if len(data) - start < size:
            raise ShardError(f"{self.where}/{name} is truncated: {size} bytes at offset {offset} needed")
        return data[start : start + size]

    def whole(self, name: str) -> bytes:
        return bytes(self._ask(name, self._fs.cat_file))

    def _ask(self, name: str, call: Callable[..., Any], *more: int) -> Any:
        """`call(path, ...)`, tried again after a pause: over a network a read may fail once. Raises `ShardError`."""
        path = f"{self._root}/{checked_name(name)}"
        for pause_s in (*PAUSES_S, None):
            try:
                return call(path, *more)
            except Exception as error:  # every file system has errors of its own
                if pause_s is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise ShardError(
                        f"{self.where}/{name} cannot be read ({str(error) or type(error).__name__}); "
                        "check the address and the access"
                    ) from error
                time.sleep(pause_s)

    def forget(self, name: str) -> None:
        """Drop the cached blocks of one file: they may be what is corrupted, not the origin."""
        with self._lock:
            for key in [k for k in self._kept if k.startswith(f"{name}.")]:
                self._drop(key)

    def _get(self, name: str, block: int) -> bytes:
        key = f"{name}.{self._block}.{block}.block"
        if key in self._kept:
            try:
                self._kept.move_to_end(key)
                return (self.folder / key).read_bytes()
            except OSError:  # somebody emptied the cache
                self._drop(key)
        data = bytes(self._ask(name, self._fs.cat_file, block * self._block, (block + 1) * self._block))
        if len(data) > self._block:  # a server that ignores ranges sends the whole file
            data = data[block * self._block : (block + 1) * self._block]
        part = self.folder / f"{key}.{os.getpid()}.part"
        part.write_bytes(data)
        os.replace(part, self.folder / key)
        self._kept[key] = len(data)
        self._bytes += len(data)
        while self._bytes > self._limit:
            self._drop(next(iter(self._kept)))
        return data

    def _drop(self, key: str) -> None:
        self._bytes -= self._kept.pop(key)
        (self.folder / key).unlink(missing_ok=True)
