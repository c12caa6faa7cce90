"""The ragged layout of a stream's pieces: a head (timestamp, opening token, shape), a body, a closing token each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Arrays are int64 [pieces] but for `piece` and `inside`, which are [tokens]."""

    segment: np.ndarray
    """Index into the prepared segments."""
    first: np.ndarray
    """First token of the segment that the piece shows."""
    end: np.ndarray
    block: np.ndarray
    """Index of the block (merged run, or lone segment) that it belongs to."""
    stamp: np.ndarray
    """bool: a timestamp stands before it."""
    head: np.ndarray
    """Tokens before the body."""
    count: np.ndarray
    """Tokens of the body."""
    start: np.ndarray
    """Where the piece begins in the stream."""
    piece: np.ndarray
    """Piece of each token."""
    inside: np.ndarray
    """Place of each token in its piece."""

    @classmethod
    def of(
        cls, segment: np.ndarray, first: np.ndarray, end: np.ndarray, block: np.ndarray, stamp: np.ndarray, head: np.ndarray
    ) -> Layout:
        """Lay the pieces out one after the other."""
        count = end - first
        length = head + count + 1
        start = np.cumsum(length) - length
        piece = np.repeat(np.arange(len(segment)), length)
        return cls(segment, first, end, block, stamp, head, count, start, piece, np.arange(len(piece)) - start[piece])

    @property
    def length(self) -> np.ndarray:
        """Tokens of each piece."""
        return self.head + self.count + 1


def grouped(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(value, where it stands) for every distinct value, in one sort."""
    if not len(values):
        return
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    for part in np.split(order, edges):
        yield int(values[part[0]]), part
