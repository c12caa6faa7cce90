"""Demonstrations: a piece of another episode of the same task in front of a control sequence (Gato, arXiv 2205.06175, 2.2).

In: the tokenised segments of two documents. Out: the first one's window, moved in time to end just before the second begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from weft.tokenizers.base import Tokens
from weft.tokenizers.interleave import Prepared


def demonstration(items: Sequence[Prepared], budget: int, where: str, at: float) -> list[Prepared]:
    """About `budget` tokens of an episode, observed: its end, or (where="any") the place that `at` in [0, 1) names.

    Episodes on a clock give a window of time; others give whole neighbouring segments. Empty where nothing fits.
    """
    total = sum(len(item.tokens) for item in items)
    if not total or budget < 1:
        return []
    share = min(1.0, budget / total)
    if all(item.start is not None for item in items):
        first = min(int(item.group_times()[0]) for item in items if len(item.tokens))
        end = max(int(item.group_times()[-1]) for item in items if len(item.tokens)) + 1
        length = max(1, int(share * (end - first)))
        begin = end - length if where == "end" else first + int(at * (end - first - length + 1))
        cut = [part for item in items if (part := window(item, begin, begin + length)) is not None]
    else:
        count = max(1, int(share * len(items)))
        start = len(items) - count if where == "end" else int(at * (len(items) - count + 1))
        cut = list(items[start : start + count])
    if sum(len(item.tokens) for item in cut) > 2 * budget:
        return []
    return [replace(item, segment=replace(item.segment, role="observed")) for item in cut]


def window(item: Prepared, begin: int, end: int) -> Prepared | None:
    """The groups of a segment whose time lies in [begin, end); segments of fixed shape whole or not at all."""
    times, tokens, group = item.group_times(), item.tokens, item.tokens.group
    low, high = int(np.searchsorted(times, begin)), int(np.searchsorted(times, end))
    if low == 0 and high == len(times):
        return item if len(times) else None
    sliceable = tokens.grid and int(np.prod(tokens.grid)) == len(tokens) and tokens.grid[0] == len(times) and not _whole(item)
    if high <= low or not sliceable:
        return None
    rows = slice(low * group, high * group)
    part = Tokens(
        codes=tokens.codes[rows],
        grid=(high - low, *tokens.grid[1:]),
        time=tokens.time[rows] - tokens.time[low * group],
        features=None if tokens.features is None else tokens.features[rows],
        place=None if tokens.place is None else tokens.place[rows],
        group=group,
    )
    return replace(item, tokens=part, start=int(times[low]))


def _whole(item: Prepared) -> bool:
    """Images have no time inside, text no clock of its own."""
    return item.entry.name == "text" or item.entry.whole


def prepend(prompt: Sequence[Prepared], items: Sequence[Prepared], gap_ns: int) -> list[Prepared]:
    """Prompt, then episode: clocked prompts end `gap_ns` before the episode's first token; sources are numbered through."""
    if prompt and all(i.start is not None for i in (*prompt, *items)):
        last = max(int(i.group_times()[-1]) for i in prompt)
        first = min(int(i.group_times()[0]) for i in items if len(i.tokens))
        prompt = [replace(i, start=(i.start or 0) + first - gap_ns - last) for i in prompt]
    return [replace(item, source=number) for number, item in enumerate((*prompt, *items))]
