"""Segments in, pieces in stream order out: clocks are merged by time, everything else keeps its place.

A run of neighbouring segments that all have a clock is merged: their groups (a frame, a reading) are sorted by
(chunk, time, modality, name, content), so the order in which they were handed in does not matter. A segment without a clock is
a barrier: nothing moves across it. Linear in tokens but for one sort of the units inside a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from weft.tokenizers.base import Tokens
from weft.tokenizers.registry import Modality
from weft.tokenizers.segment import Segment

UNLIMITED = 1 << 40
"""Limit of a segment whose pieces may have any number of groups."""


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

    @cached_property
    def clock(self) -> np.ndarray:
        """int64 [max(n, 1)]: ns of each token, on the document's clock if there is one. A text without tokens has its start."""
        start = self.start or 0
        return self.tokens.time + start if len(self.tokens) else np.array([start], np.int64)

    def group_times(self) -> np.ndarray:
        """int64 [max(groups, 1)]: ns of each group's first token, as `clock`."""
        return self.clock[:: self.tokens.group]

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


class Block(NamedTuple):
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
            blocks.append(_merge(prepared, run, chunk_ns, joined))
            run = []
        blocks.append(_whole(item, i))
    if run:
        blocks.append(_merge(prepared, run, chunk_ns, joined))
    return blocks if min(limits) == UNLIMITED else [_limited(block, limits) for block in blocks]


def _whole(item: Prepared, i: int) -> Block:
    """A segment that nothing is merged with, in one piece."""
    clocked, groups = item.start is not None, len(item.tokens) // item.tokens.group
    origin = int(item.clock[0]) if clocked else 0
    return Block(clocked, origin, np.array([i]), np.array([0]), np.array([groups]))


def _merge(prepared: Sequence[Prepared], run: list[int], chunk_ns: int, joined: bool) -> Block:
    if joined and len(run) == 1:
        return _whole(prepared[run[0]], run[0])
    rank = _ranks(prepared, run)
    times = [prepared[i].group_times() for i in run]
    origin = min(int(time[0]) for time in times)
    columns: list[tuple[np.ndarray, ...]] = []
    for i, time in zip(run, times):
        chunk = (time - origin) // chunk_ns if chunk_ns else time
        first = changes(chunk).nonzero()[0]
        end = _following(first, len(prepared[i].tokens) // prepared[i].tokens.group)
        columns.append((chunk[first], time[first], first, end))
    pieces = [len(first) for *_, first, _ in columns]
    chunk, time, first, end = (np.concatenate(column) for column in zip(*columns))
    order = np.lexsort((np.array([rank[i] for i in run]).repeat(pieces), time, chunk))
    block = Block(True, origin, np.array(run).repeat(pieces)[order], first[order], end[order])
    return _joined(block) if joined else block


def _following(starts: np.ndarray, end: int) -> np.ndarray:
    """int64 [n >= 1]: where the next one starts, and `end` for the last."""
    following = np.empty(len(starts), np.int64)
    following[:-1], following[-1] = starts[1:], end
    return following


def changes(values: np.ndarray) -> np.ndarray:
    """bool [n]: which values differ from the one before; the first does."""
    new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new


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
    starts = changes(block.segment).nonzero()[0]
    last = _following(starts, len(block.segment)) - 1
    return block._replace(segment=block.segment[starts], first=block.first[starts], end=block.end[last])


def _limited(block: Block, limits: Sequence[int]) -> Block:
    """Pieces longer than the grammar can state (more frames than there are number tokens) are cut."""
    limit, groups = np.array(limits, np.int64)[block.segment], block.end - block.first
    if (groups <= limit).all():
        return block
    parts = np.maximum(-(-groups // limit), 1)
    which = np.repeat(np.arange(len(parts)), parts)
    place = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = block.first[which] + place * limit[which]
    end = np.minimum(first + limit[which], block.end[which])
    return block._replace(segment=block.segment[which], first=first, end=end)
