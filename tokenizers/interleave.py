"""Segments in, pieces in stream order out: clocks are merged by time, everything else keeps its place.

A run of neighbouring segments that all have a clock is merged: their groups (a frame, a reading) are sorted by
(chunk, time, modality, name, content), so the order in which they were handed in does not matter. A segment without a clock is
a barrier: nothing moves across it. Linear in tokens but for one sort of the units inside a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.tokenizers.base import Tokens
from weft.tokenizers.registry import Modality
from weft.tokenizers.segment import Segment


@dataclass(frozen=True)
class Prepared:
    """A tokenised segment on its way into a stream."""

    segment: Segment
    entry: Modality
    order: int
    """Place of the modality in the registry."""
    tokens: Tokens
    start: int | None
    """ns on the document's clock."""
    source: int
    """Index in the document."""

    def group_times(self) -> np.ndarray:
        """int64 [groups]: ns of each group's first token, on the document's clock if there is one."""
        return self.tokens.time[:: self.tokens.group] + (self.start or 0)

    def content(self) -> bytes:
        """Digest of what stands in the stream: the last tie-breaker."""
        hasher = hashlib.blake2b(digest_size=16)
        tokens = self.tokens
        hasher.update(repr((tokens.grid, tokens.group, self.segment.role)).encode())
        for array in (tokens.time, tokens.codes, tokens.features, tokens.place):
            hasher.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        fields = {k: v for k, v in vars(self.segment).items() if k not in ("start", "name", self.entry.content)}
        hasher.update(repr(sorted(fields.items())).encode())
        return hasher.digest()


@dataclass(frozen=True)
class Block:
    """A merged run of clocked segments, or one segment without a clock. All arrays are [pieces], in stream order."""

    clocked: bool
    origin: int
    """ns of the first token of a run; 0 without a clock."""
    segment: np.ndarray
    """int64: index into the prepared segments."""
    first: np.ndarray
    """int64: first group of the piece."""
    end: np.ndarray
    """int64: end of its groups."""


def interleave(prepared: Sequence[Prepared], chunk_ns: int, limits: Sequence[int], joined: bool = True) -> list[Block]:
    """Blocks of pieces in stream order. `limits[i]` is the largest number of groups that a piece of segment i may have.

    `joined`: pieces of one segment with nothing between them become one; otherwise every chunk is a piece (timestamps).
    """
    blocks: list[Block] = []
    run: list[int] = []
    for i, item in enumerate(prepared):
        if item.start is not None:
            run.append(i)
            continue
        if run:
            blocks.append(_merge(prepared, run, chunk_ns, limits, joined))
            run = []
        groups = len(item.tokens) // item.tokens.group
        blocks.append(_limited(Block(False, 0, np.array([i]), np.array([0]), np.array([groups])), limits))
    if run:
        blocks.append(_merge(prepared, run, chunk_ns, limits, joined))
    return blocks


def _merge(prepared: Sequence[Prepared], run: list[int], chunk_ns: int, limits: Sequence[int], joined: bool) -> Block:
    rank = _ranks(prepared, run)
    times = [prepared[i].group_times() for i in run]
    # A segment without tokens (an empty text) still has a place: its start.
    origin = min(int(t[0]) if len(t) else prepared[i].start or 0 for i, t in zip(run, times))
    columns: list[tuple[np.ndarray, ...]] = []
    for i, time in zip(run, times):
        if not len(time):
            time = np.array([prepared[i].start], np.int64)
        chunk = (time - origin) // chunk_ns if chunk_ns else time
        first = np.flatnonzero(np.r_[True, np.diff(chunk) != 0])
        groups = len(prepared[i].tokens) // prepared[i].tokens.group
        end = np.minimum(np.r_[first[1:], groups], groups)
        columns.append((chunk[first], time[first], np.full(len(first), rank[i]), np.full(len(first), i), first, end))
    chunk, time, ranks, segment, first, end = (np.concatenate(column) for column in zip(*columns))
    order = np.lexsort((ranks, time, chunk))
    block = Block(True, origin, segment[order], first[order], end[order])
    return _limited(_joined(block) if joined else block, limits)


def _ranks(prepared: Sequence[Prepared], run: list[int]) -> dict[int, int]:
    """Order at equal times: modality, name, and content only where those do not decide."""
    plain = {i: (prepared[i].order, prepared[i].segment.name or "") for i in run}
    count: dict[tuple[int, str], int] = {}
    for key in plain.values():
        count[key] = count.get(key, 0) + 1
    ordered = sorted(run, key=lambda i: (*plain[i], prepared[i].content() if count[plain[i]] > 1 else b""))
    return {i: place for place, i in enumerate(ordered)}


def _joined(block: Block) -> Block:
    """Neighbouring pieces of one segment become one."""
    new = np.r_[True, np.diff(block.segment) != 0]
    starts = np.flatnonzero(new)
    last = np.r_[starts[1:], len(new)] - 1
    return Block(block.clocked, block.origin, block.segment[starts], block.first[starts], block.end[last])


def _limited(block: Block, limits: Sequence[int]) -> Block:
    """Pieces longer than the grammar can state (more frames than there are number tokens) are cut."""
    limit = np.asarray(limits, np.int64)[block.segment]
    parts = np.maximum(-(-(block.end - block.first) // limit), 1)
    if (parts == 1).all():
        return block
    which = np.repeat(np.arange(len(parts)), parts)
    place = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = block.first[which] + place * limit[which]
    end = np.minimum(first + limit[which], block.end[which])
    return Block(block.clocked, block.origin, block.segment[which], first, end)
