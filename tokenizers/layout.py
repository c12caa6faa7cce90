"""The ragged layout of a stream's pieces: a head (timestamp, opening token, shape), a body, a closing token each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Arrays are int64 [pieces], or [tokens] where it says so."""

    segment: np.ndarray
    """Index into the prepared segments."""
    first: np.ndarray
    """First token of the segment that the piece shows."""
    stamp: np.ndarray
    """bool: a timestamp stands before it."""
    head: np.ndarray
    """Tokens before the body."""
    count: np.ndarray
    """Tokens of the body."""
    start: np.ndarray
    """Where the piece begins in the stream."""
    tail: np.ndarray
    """Where its closing token stands."""
    piece: np.ndarray
    """[tokens] Piece of each token."""
    inside: np.ndarray
    """[tokens] Place of each token in its piece."""
    place: np.ndarray
    """[tokens] Place in the body: below zero in the head, `count` for the closing token."""
    body: np.ndarray
    """bool [tokens]: it stands in the body."""
    shown: np.ndarray
    """[tokens] What a body token shows: its index in the tokens of all segments, side by side. The head of a piece has that of
    its first body token, the closing token that of the last."""
    offset: np.ndarray
    """[segments] Where the tokens of a segment begin among those of all. One without tokens has room for one."""

    @classmethod
    def of(
        cls, segment: np.ndarray, first: np.ndarray, end: np.ndarray, stamp: np.ndarray, head: np.ndarray, sizes: np.ndarray
    ) -> Layout:
        """Lay the pieces out one after the other. `end`: of the tokens that a piece shows; `sizes`: tokens of the segments."""
        count = end - first
        length = head + count + 1
        after = length.cumsum()
        start = after - length
        piece = np.arange(len(segment)).repeat(length)
        inside = np.arange(len(piece)) - start[piece]
        place = inside - head[piece]
        counts = count[piece]
        body = (place >= 0) & (place < counts)
        sizes = np.maximum(sizes, 1)
        offset = sizes.cumsum() - sizes
        shown = (first + offset[segment])[piece] + np.maximum(np.minimum(place, counts - 1), 0)
        return cls(segment, first, stamp, head, count, start, after - 1, piece, inside, place, body, shown, offset)


def grouped(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(value, where it stands) for every distinct value, in one sort."""
    if not len(values):
        return
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    for part in np.split(order, edges):
        yield int(values[part[0]]), part
