"""A document longer than a row, cut into parts that are streams themselves.

In: the stream of a whole document. Out: parts with `<doc>` in front. A piece that is too long by itself is cut between its
groups (readings, frames, text tokens) into pieces of the same form. The head of each stands where its first body token does and
the closing token where its last one does, in position, time and timestamp; `Stream.info` tells what is in the part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from weft.tokenizers.stream import NO_TIME, SegmentInfo, Stream, StreamError
from weft.tokenizers.vocabulary import SPECIALS

STAMP = SPECIALS.index("<time>")
STAMP_TOKENS = 5
_CENTISECOND = 10_000_000


def cut_stream(stream: Stream, length: int) -> list[Stream]:
    """Parts of at most `length` tokens, cut after closing tokens where a piece fits into a row. Positions are shifted so that
    each part starts at the front; closing tokens that cutting adds bear no loss. Raises StreamError for what has to stay
    together and does not fit."""
    is_body = _body(stream)
    parts: list[list[_Take]] = [[]]
    room = length - 1
    for first, end in _piece_bounds(stream):
        for take in _fitting(stream, is_body, first, end, length - 1):
            if len(take.index) > room:
                parts.append([])
                room = length - 1
            parts[-1].append(take)
            room -= len(take.index)
    order = _place_in_segment(stream, is_body)
    return [_part(stream, is_body, order, takes) for takes in parts if takes]


@dataclass(frozen=True)
class _Take:
    """Tokens of one piece of a part."""

    index: np.ndarray
    head: int = 0
    """Tokens before the body."""
    skipped: int = 0
    """Body tokens of the piece that went to earlier parts."""
    added_closer: bool = False
    lead: int | None = None
    """What to add to the first shape number (frames that went to another part)."""


def _piece_bounds(stream: Stream) -> list[tuple[int, int]]:
    """(first, end) of each piece after `<doc>`; what follows the last closing token (`</doc>`) stays with it."""
    closers = np.flatnonzero(stream.landmark)[1:]
    if not len(closers):
        raise StreamError(f"a document of {len(stream)} tokens has no closing token to cut at; close its segments")
    ends = closers + 1
    ends[-1] = len(stream)
    return list(zip([1, *ends[:-1].tolist()], ends.tolist()))


def _body(stream: Stream) -> np.ndarray:
    """bool [n]: tokens that are content: neither heads nor closing tokens."""
    text = np.array([info.modality == "text" for info in stream.info] + [False], bool)[stream.segment]
    is_body = (stream.segment >= 0) & ~stream.landmark & (text | (stream.output_slice != 0))
    stamped = np.flatnonzero((stream.ids == STAMP) & (stream.segment >= 0))
    is_body[(stamped[:, None] + np.arange(STAMP_TOKENS)).ravel()] = False
    return is_body


def _place_in_segment(stream: Stream, is_body: np.ndarray) -> np.ndarray:
    """int64 [n]: which of its segment's tokens a body token is; -1 elsewhere."""
    at = np.flatnonzero(is_body)
    at = at[np.argsort(stream.segment[at], kind="stable")]
    segment = stream.segment[at]
    order = np.full(len(stream), -1, np.int64)
    order[at] = np.arange(len(at)) - np.searchsorted(segment, segment)
    return order


def _fitting(stream: Stream, is_body: np.ndarray, first: int, end: int, room: int) -> list[_Take]:
    """The piece whole, or in pieces of its groups."""
    if end - first <= room:
        return [_Take(np.arange(first, end))]
    segment = int(stream.segment[first])
    if not stream.info:
        raise StreamError(
            f"a piece of {end - first} tokens does not fit a row of {room + 1}, and the stream has no segment infos"
        )
    info = stream.info[segment]
    closer = int(np.flatnonzero(stream.landmark[first:end])[-1]) + first
    body = np.flatnonzero(is_body[first:closer])
    head = int(body[0])
    group = info.group
    if info.modality != "text" and len(info.grid) == 3:
        group = int(np.lcm(group, info.grid[1] * info.grid[2]))
    elif len(info.grid) == 2 and group == 1 and info.modality != "text":
        group = info.grid[1]
    most = (room - head - 1 - (end - closer - 1)) // group * group
    if most <= 0 or group >= len(body):
        name = f"{info.modality} segment {info.name!r}" if info.name else f"{info.modality} segment {segment}"
        raise StreamError(
            f"{name} has {end - first} tokens that stay together, a row has {room + 1}; raise its length or make it smaller"
        )
    takes = []
    for at in range(0, len(body), most):
        stop = min(at + most, len(body))
        last = stop == len(body)
        tail = np.arange(closer, end) if last else np.array([closer])
        index = np.concatenate([np.arange(first, first + head), first + body[at:stop], tail])
        lead = (stop - at - len(body)) // (info.grid[1] * info.grid[2]) if len(info.grid) == 3 else None
        takes.append(_Take(index, head, at, not last, lead))
    return takes


def _part(stream: Stream, is_body: np.ndarray, order: np.ndarray, takes: list[_Take]) -> Stream:
    index = np.concatenate([np.zeros(1, np.int64), *(take.index for take in takes)])
    part = stream.take(index)
    ids, weight, position, two_way = part.ids.copy(), part.weight.copy(), part.position.copy(), part.two_way.copy()
    time, at = part.time.copy(), 1
    for take in takes:
        end = at + len(take.index)
        if take.skipped:
            head, first = slice(at, at + take.head), take.index[take.head]
            position[head] += stream.position[first, 0] - stream.position[first - take.skipped, 0]
            time[head] = stream.time[first]
            if take.head and ids[at] == STAMP:
                ids[at + 1 : at + STAMP_TOKENS] += _digits(stream, first) - _digits(stream, first - take.skipped)
        if take.added_closer:
            last = take.index[-2]
            weight[end - 1], time[end - 1] = 0.0, stream.time[last]
            position[end - 1] += stream.position[last, 0] - stream.position[take.index[-1] - 1, 0]
        if take.lead:
            # The opening tokens end where the body begins; the first number is three before it.
            ids[at + take.head - 3] += take.lead
        at = end
    if len(position) > 1:
        position[1:] -= position[1:].min() - 1
    if (two_way >= 0).any():
        two_way[two_way >= 0] -= two_way[two_way >= 0].min()
    info = _infos(stream, index[is_body[index]], order)
    return replace(part, ids=ids, weight=weight, position=position, two_way=two_way, time=time, info=info)


def _digits(stream: Stream, at: int) -> np.ndarray:
    """int64 [4]: the digits of the timestamp at token `at`, in base 100, from the first clocked token of the document."""
    origin = stream.time[stream.time != NO_TIME].min()
    return (stream.time[at] - origin) // _CENTISECOND // 100 ** np.arange(3, -1, -1) % 100


def _infos(stream: Stream, body: np.ndarray, order: np.ndarray) -> tuple[SegmentInfo, ...]:
    """What a part holds of each segment, given where its body tokens are in the stream."""
    infos = list(stream.info)
    segment, total = stream.segment[body], np.bincount(stream.segment[order >= 0], minlength=len(infos))
    for i in np.unique(segment).tolist():
        mine = order[body[segment == i]]
        if len(mine) < total[i]:
            infos[i] = infos[i].part(int(mine[0]), len(mine))
    return tuple(infos)
