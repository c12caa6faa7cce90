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

from weft.tokenizers.interleave import Block, Prepared, changes
from weft.tokenizers.layout import Layout
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
        return at[:, None].repeat(3, axis=1)

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


def body(placer: Placer, item: Prepared, part: slice = slice(None)) -> np.ndarray:
    """[n 3] of a part of a segment's tokens on the running clock. Those of a text lie at its start."""
    entry, time = item.entry, item.clock[part]
    ticks = placer.ticks(time)
    position = ticks[:, None].repeat(3, axis=1)
    if entry.opener is None:
        return position
    place = places_of(item)[part]
    if entry.place == "grid":
        position[:, 1:] = placer.next + place
        return position
    rank = rank_in_tick(ticks, place[:, 0])
    # A session pushes reading by reading: a segment that goes on where the last one of its name ended counts on.
    key = (entry.name, item.segment.name)
    before, tick, seen = placer.counts.get(key, (0, -1, 0))
    if before < time[0] and tick == ticks[0]:
        rank[ticks == tick] += seen
    placer.counts[key] = (int(time[-1]), int(ticks[-1]), int(rank[ticks == ticks[-1]].max()) + 1)
    if entry.place == "channel":
        position[:, 1:] = placer.next
        position[:, 1] += place[:, 0]
    position[:, 2] += rank
    return position


def rank_in_tick(ticks: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """int64 [n]: how many earlier tokens of the segment have the same tick and channel. `ticks` never decrease."""
    if not ((ticks[1:] == ticks[:-1]) & (channel[1:] <= channel[:-1])).any():
        return np.zeros(len(ticks), np.int64)  # in order, and none twice
    order = np.lexsort((channel, ticks))
    new = changes(ticks[order]) | changes(channel[order])
    at = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = at - np.maximum.accumulate(at * new)
    return rank


def places_of(item: Prepared) -> np.ndarray:
    """int64 [max(n, 1) 2]: (h, w) of each token, zeros where the tokenizer gives none."""
    if item.tokens.place is None:
        return np.zeros((len(item.clock), 2), np.int64)
    return np.asarray(item.tokens.place, np.int64)


def place_blocks(placer: Placer, items: Sequence[Prepared], layout: Layout, blocks: Sequence[Block]) -> np.ndarray:
    """[n 3] of all tokens of the layout, block after block."""
    parts = []
    end = 0
    for block in blocks:
        first, end = end, end + len(block.segment)
        if block.clocked:
            parts.append(_place_run(placer, items, layout, block.origin, first, end))
        else:
            parts += [_place_alone(placer, items[layout.segment[p]], layout, p) for p in range(first, end)]
    return np.concatenate(parts)


def _place_alone(placer: Placer, item: Prepared, layout: Layout, p: int) -> np.ndarray:
    """A piece without a clock: head in order, body on a clock of its own, closing token after the maximum."""
    head, first, count = int(layout.head[p]), int(layout.first[p]), int(layout.count[p])
    if item.entry.opener is None:
        return placer.ordinal(head + count + 1)
    opening = placer.ordinal(head)
    placer.start_clock(int(item.clock[first]))
    position = body(placer, item, slice(first, first + count))
    placer.used(position)
    return np.concatenate([opening, position, placer.ordinal(1)])


def _place_run(placer: Placer, items: Sequence[Prepared], layout: Layout, origin: int, first: int, end: int) -> np.ndarray:
    """Pieces first .. end - 1 of a merged run: one clock for all of them, opening and closing tokens included."""
    placer.start_clock(origin)
    # Segments are numbered as they appear, so those of a run are neighbours.
    low, high = (int(layout.segment[p]) if p < len(layout.segment) else len(items) for p in (first, end))
    mine = slice(int(layout.start[first]), int(layout.tail[end - 1]) + 1)
    bodies = np.concatenate([body(placer, item) for item in items[low:high]])
    position, inside = bodies[layout.shown[mine] - layout.offset[low]], layout.inside[mine]
    outside = (~layout.body[mine]).nonzero()[0]
    ticks = position[outside, 0]
    position[outside, 1] = ticks
    position[outside, 2] = ticks + inside[outside] * (layout.place[mine][outside] < 0)
    if any(item.entry.opener is None for item in items[low:high]):
        is_text = np.array([item.entry.opener is None for item in items[low:high]])
        text = is_text[layout.segment[layout.piece[mine]] - low].nonzero()[0]
        position[text] = position[text, :1] + inside[text, None]
    placer.used(position)
    return position


PATCH_SIDE = 8


def patch_channel(place: np.ndarray) -> np.ndarray:
    """int64 [n]: the channel of patches at (row, column) `place` [n 2]: their place within a tile of 8 x 8 patches.

    Rotary axes tell a query how far away a patch is, not where in its picture it lies; with 2 x 2 pixel patches a small model
    read 26 % of held-out digits without this and 82 % with it after 245,000 tokens. Gato embeds row and column as well.
    """
    return (place[:, 0] % PATCH_SIDE * PATCH_SIDE + place[:, 1] % PATCH_SIDE).astype(np.int64)


def channels_of(item: Prepared) -> np.ndarray:
    """int64 [max(n, 1)]: the channel of each token: a reading's or an action's own, a patch's place, else 0."""
    if item.entry.place == "none":
        return np.zeros(len(item.clock), np.int64)
    place = places_of(item)
    return patch_channel(place) if item.entry.place == "grid" else place[:, 0]
