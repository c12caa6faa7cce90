"""Where tokens stand on the three rotary axes (t, h, w): M-RoPE with a physical clock (arXiv 2409.12191, 2503.20215).

- A token without a clock and every token of a text move all three axes together, one step per token.
- Inside a body, t is the clock in ticks (40 ms); an image or frame adds (row, column) to h and w; a sensor reading or an
  action adds the channel to h and its place within the tick to w; sound moves t, h, w together and adds the place to w.
- A segment without a clock has its own clock, which starts at the position after what came before; a merged run of clocked
  segments has one, so distances in t are physical across modalities. What follows starts after the maximum of the three axes.

`Placer` is the state between pieces, so that a session, or generation token by token, places as one whole document would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.tokenizers.interleave import Block, Prepared
from weft.tokenizers.layout import Layout, grouped
from weft.tokenizers.stream import StreamError


@dataclass
class Placer:
    """The next free position and the clock that runs, if one does."""

    tick_ns: int
    next: int = 0
    """First position after everything outside the running clock."""
    origin: int | None = None
    """ns at which the running clock stands at `next`."""
    highest: int = -1
    """Largest position inside the running clock."""
    counts: dict[tuple[str, str | None], tuple[int, int, int]] = field(default_factory=dict)
    """(modality, name) -> last ns, its tick, groups in that tick: readings pushed one by one share ticks like a recording's."""

    def ordinal(self, count: int) -> np.ndarray:
        """[n 3]: all three axes together, outside any running clock."""
        self.stop_clock()
        at = np.arange(self.next, self.next + count, dtype=np.int64)
        self.next += count
        return np.repeat(at[:, None], 3, axis=1)

    def start_clock(self, origin: int) -> None:
        """Begin a merged run at `origin` ns, or go on with the one that runs."""
        if self.origin is None:
            self.origin, self.highest = origin, self.next - 1
        elif origin < self.origin:
            raise StreamError(
                f"a segment starts {self.origin - origin} ns before the clock of its stream; push segments in order of time"
            )

    def stop_clock(self) -> None:
        """Whatever follows starts after the maximum."""
        if self.origin is not None:
            self.next, self.origin, self.highest = max(self.next, self.highest + 1), None, -1
            self.counts.clear()

    def ticks(self, time: np.ndarray) -> np.ndarray:
        """int64 [n]: t of tokens on the running clock."""
        assert self.origin is not None
        ticks = self.next + (time - self.origin) // self.tick_ns
        if len(ticks) and ticks.max() >= 2**31 - 2**20:
            raise StreamError(
                f"the stream spans {(int(time.max()) - self.origin) / 1e9:.0f} s, more than 2^31 ticks; raise stream.tick_s"
            )
        return ticks

    def used(self, position: np.ndarray) -> None:
        """Remember how far the running clock's tokens reach."""
        if len(position):
            self.highest = max(self.highest, int(position.max()))


def body(ticks: np.ndarray, kind: str, place: np.ndarray, base: int, rank: np.ndarray) -> np.ndarray:
    """[n 3] of body tokens. `place` [n 2], `rank` [n] place within the tick, `base` the position where h and w are zero."""
    if kind == "grid":
        return np.stack([ticks, base + place[:, 0], base + place[:, 1]], axis=1)
    if kind == "channel":
        return np.stack([ticks, base + place[:, 0], base + rank], axis=1)
    return np.stack([ticks, ticks, ticks + rank], axis=1)


def rank_in_tick(ticks: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """int64 [n]: how many earlier tokens of the segment have the same tick and channel. `ticks` never decrease."""
    if not len(ticks):
        return np.zeros(0, np.int64)
    order = np.lexsort((channel, ticks))
    new = np.r_[True, (np.diff(ticks[order]) != 0) | (np.diff(channel[order]) != 0)]
    at = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = at - np.maximum.accumulate(np.where(new, at, 0))
    return rank


def places_of(item: Prepared) -> np.ndarray:
    """int64 [n 2]: (h, w) of each token, zeros where the tokenizer gives none."""
    if item.tokens.place is None:
        return np.zeros((len(item.tokens), 2), np.int64)
    return np.asarray(item.tokens.place, np.int64)


def place_blocks(placer: Placer, items: Sequence[Prepared], layout: Layout, blocks: Sequence[Block]) -> np.ndarray:
    """[n 3] of all tokens of the layout, block after block."""
    parts = []
    edge = np.searchsorted(layout.block, np.arange(len(blocks) + 1))
    for block, first, end in zip(blocks, edge[:-1], edge[1:]):
        if block.clocked:
            parts.append(_place_run(placer, items, layout, block.origin, int(first), int(end)))
            continue
        for p in range(int(first), int(end)):
            item = items[layout.segment[p]]
            parts.append(_place_alone(placer, item, int(layout.first[p]), int(layout.end[p]), int(layout.head[p])))
    return np.concatenate(parts)


def _place_alone(placer: Placer, item: Prepared, first: int, end: int, head: int) -> np.ndarray:
    """A piece without a clock: head in order, body on a clock of its own, closing token after the maximum."""
    if item.entry.opener is None:
        return placer.ordinal(head + end - first + 1)
    place, time = places_of(item)[first:end], item.tokens.time[first:end]
    opening = placer.ordinal(head)
    placer.start_clock(int(time[0]))
    ticks = placer.ticks(time)
    position = body(ticks, item.entry.place, place, placer.next, rank_in_tick(ticks, place[:, 0]))
    placer.used(position)
    return np.concatenate([opening, position, placer.ordinal(1)])


def _place_run(placer: Placer, items: Sequence[Prepared], layout: Layout, origin: int, first: int, end: int) -> np.ndarray:
    """Pieces first .. end - 1 of a merged run: one clock for all of them, opening and closing tokens included."""
    placer.start_clock(origin)
    begin, stop = int(layout.start[first]), int(layout.start[end - 1] + layout.length[end - 1])
    piece, inside = layout.piece[begin:stop], layout.inside[begin:stop]
    position = np.empty((stop - begin, 3), np.int64)
    for i, at in grouped(layout.segment[piece]):
        item, p = items[i], piece[at]
        place, n = inside[at] - layout.head[p], layout.count[p]
        time = item.tokens.time + (item.start or 0) if len(item.tokens) else np.array([item.start], np.int64)
        whole = placer.ticks(time)
        token = np.minimum(layout.first[p] + np.clip(place, 0, np.maximum(n - 1, 0)), len(time) - 1)
        ticks = whole[token]
        if item.entry.opener is None:
            position[at] = (ticks + inside[at])[:, None]
            continue
        places = places_of(item)
        rank = rank_in_tick(whole, places[:, 0])
        # A session pushes reading by reading: a segment that goes on where the last one of its name ended counts on.
        key = (item.entry.name, item.segment.name)
        before, tick, seen = placer.counts.get(key, (0, -1, 0))
        rank = rank + np.where((whole == tick) & (before < time[0]), seen, 0)
        placer.counts[key] = (int(time[-1]), int(whole[-1]), int(rank[whole == whole[-1]].max()) + 1)
        position[at] = body(ticks, item.entry.place, places[token], placer.next, rank[token])
        outside = (place < 0) | (place >= n)
        step = np.where(place < 0, inside[at], 0)
        position[at[outside]] = np.stack([ticks, ticks, ticks + step], axis=1)[outside]
    placer.used(position)
    return position


PATCH_SIDE = 8


def patch_channel(place: np.ndarray) -> np.ndarray:
    """int64 [n]: the channel of patches at (row, column) `place` [n 2]: their place within a tile of 8 x 8 patches.

    Rotary axes tell a query how far away a patch is, not where in its picture it lies; with 2 x 2 pixel patches a small model
    read 26 % of held-out digits without this and 82 % with it after 245,000 tokens. Gato embeds row and column as well.
    """
    return (place[:, 0] % PATCH_SIDE * PATCH_SIDE + place[:, 1] % PATCH_SIDE).astype(np.int64)
