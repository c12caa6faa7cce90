"""A dictionary that holds at most so many bytes; what was not used for the longest time goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Bounded(Generic[Key, Value]):
    """Values with their sizes; a value larger than the bound is not kept."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"a cache of {max_bytes} bytes; give 0 or more")
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, now the youngest; None if it is not there."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of `size` bytes."""
        self.drop(key)
        if size > self.max_bytes:
            return
        self._kept[key] = (value, size)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, key: Key) -> bool:
        """Forget a value; whether it was there."""
        found = self._kept.pop(key, None)
        if found is None:
            return False
        self.bytes -= found[1]
        return True

    def keys(self) -> list[Key]:
        """Oldest first."""
        return list(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
