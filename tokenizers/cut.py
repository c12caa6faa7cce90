"""A document longer than a row, cut into parts that are streams themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from weft.tokenizers.stream import Stream, StreamError


def cut_stream(stream: Stream, length: int) -> list[Stream]:
    """Parts of at most `length` tokens, each with `<doc>` in front, cut after closing tokens.

    A piece that is too long by itself is cut between its groups (readings, frames, text tokens) into pieces of the same form;
    the closing tokens that this adds bear no loss. Positions are shifted so that each part starts at the front.
    """
    bounds = _piece_bounds(stream)
    parts: list[list[_Take]] = [[]]
    room = length - 1
    for first, end in bounds:
        for take in _fitting(stream, first, end, length - 1):
            if len(take.index) > room:
                parts.append([])
                room = length - 1
            parts[-1].append(take)
            room -= len(take.index)
    return [_part(stream, takes) for takes in parts if takes]


@dataclass(frozen=True)
class _Take:
    """Tokens of one piece of a part."""

    index: np.ndarray
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


def _fitting(stream: Stream, first: int, end: int, room: int) -> list[_Take]:
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
    if info.modality == "text":
        body = np.arange(closer - first - info.grid[0], closer - first)
    else:
        body = np.flatnonzero(stream.output_slice[first:closer] != 0)
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
        takes.append(_Take(index, not last, lead))
    return takes


def _part(stream: Stream, takes: list[_Take]) -> Stream:
    index = np.concatenate([np.zeros(1, np.int64), *(take.index for take in takes)])
    part = stream.take(index)
    ids, weight, position, two_way = part.ids.copy(), part.weight.copy(), part.position.copy(), part.two_way.copy()
    at = 1
    for take in takes:
        if take.added_closer:
            weight[at + len(take.index) - 1] = 0.0
        if take.lead:
            # The opening tokens end where the body begins; the first number is three before it.
            body = at + int(np.flatnonzero(part.output_slice[at : at + len(take.index)] != 0)[0])
            ids[body - 3] += take.lead
        at += len(take.index)
    if len(position) > 1:
        position[1:] -= position[1:].min() - 1
    if (two_way >= 0).any():
        two_way[two_way >= 0] -= two_way[two_way >= 0].min()
    return replace(part, ids=ids, weight=weight, position=position, two_way=two_way)
