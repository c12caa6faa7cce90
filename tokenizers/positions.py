"""Where tokens stand on the three rotary axes (t, h, w): M-RoPE with a physical clock (arXiv 2409.12191, 2503.20215).

- A token without a clock and every token of a text move all three axes together, one step per token.
- Inside a body, t is the clock in ticks (40 ms); an image or frame adds (row, column) to h and w; a sensor reading or an action
  adds the channel to h and its place within the tick to w; sound moves t, h, w together and adds the place within the tick to w.
- A segment without a clock has its own clock, which starts at the position after what came before; a merged run of clocked
  segments has one, so distances in t are physical across modalities. What follows starts after the maximum of the three axes.

`Placer` is the state between pieces, so that a session, or generation token by token, places as one whole document would.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    counts: dict[tuple[str, str | None], tuple[int, int]] = field(default_factory=dict)
    """(modality, name) -> last tick and how many groups it holds: a session's readings share ticks like a recording's."""

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
