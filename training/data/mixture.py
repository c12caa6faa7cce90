"""Which document is draw number g: a pure function of (seed, g), with no iterator to save.

In: sources with their numbers of units (documents, or groups of documents with one pair key) and their weights. Out:
`Mixture.at(g) -> (source, position)` and `unit(...)`, the unit that stands at that position of the source's own
shuffled passes.

Time is cut into periods of `PERIOD` draws. In each, source k gets a whole number of slots (largest remainders, at least
one), spread evenly with a jitter that differs per period, so that every step sees nearly the weighted mix. Position p
of a source of n units is unit `order[p % n]` of pass `p // n`; every pass has its own permutation: within a pass
nothing is lost or repeated, whatever the number of ranks, workers or resumes. A source that has made its `repeats`
passes ends exactly there, and the others share its slots.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.training.random import permutation, uniforms

PERIOD = 4096


class DataExhausted(ValueError):
    """Every source has made all the passes it may make."""


@dataclass(frozen=True)
class Share:
    """How often a source is drawn."""

    name: str
    units: int
    weight: float | None = None
    """Relative share of the draws; None = by size (see `shares`). Give it for all sources or for none."""
    repeats: float | None = None
    """Passes over the source at most; None = no end."""
    cap: int | None = None
    """Units counted at most when the share follows from the size."""

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"source {self.name!r} has no documents; check its folder and split")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"source {self.name!r} has weight {self.weight}; give a number above 0 or leave the source out")
        if self.repeats is not None and not 0 < self.repeats < float("inf"):
            raise ValueError(f"source {self.name!r} has repeats {self.repeats}; give passes above 0, or null for no end")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"source {self.name!r} has cap {self.cap}; give a number of documents above 0")

    @property
    def limit(self) -> int | None:
        """Positions that may be drawn in all."""
        return None if self.repeats is None else max(1, round(self.repeats * self.units))


@dataclass(frozen=True)
class _Phase:
    """Draws [first, next phase's first) with one set of slots."""

    first: int
    active: tuple[int, ...]
    slots: np.ndarray
    """int64 [active]: slots per period."""
    drawn: np.ndarray
    """int64 [sources]: positions drawn before this phase."""


def shares(sources: Sequence[Share], temperature: float = 1.0) -> np.ndarray:
    """float64 [sources], sum 1. Without weights: min(size, cap)^(1 / temperature), as T5 mixes (arXiv 1910.10683, 3.5.2)."""
    if not temperature > 0:
        raise ValueError(f"mixture temperature {temperature} must be above 0 (1 = by size, larger = more even)")
    given = [s.weight is not None for s in sources]
    if any(given) and not all(given):
        missing = sources[given.index(False)].name
        raise ValueError(f"source {missing!r} has no weight and others have; give a weight to every source or to none")
    sizes = [s.weight if s.weight is not None else min(s.units, s.cap or s.units) for s in sources]
    scaled = np.array(sizes, np.float64) ** (1.0 / temperature)
    return scaled / scaled.sum()


def slots(share: np.ndarray, period: int = PERIOD) -> np.ndarray:
    """int64 [sources], sum `period`: largest remainders, at least one slot each."""
    exact = share / share.sum() * period
    count = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.lexsort((np.arange(len(share)), -(exact - count)))
    while (short := period - int(count.sum())) != 0:
        if short > 0:
            count[order[:short]] += 1
        else:
            count[int(np.argmax(count))] -= 1
    return count


class Mixture:
    """Sources drawn by weight, addressed by the number of the draw."""

    def __init__(self, sources: Sequence[Share], *, seed: int, temperature: float = 1.0) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source; name a folder of shards under data.sources")
        names = [s.name for s in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources are called {max(names, key=names.count)!r}; give each its own name")
        if len(sources) > PERIOD // 4:
            raise ValueError(f"{len(sources)} sources are more than {PERIOD // 4}; prepare small ones into one folder")
        self.sources, self.seed = tuple(sources), seed
        self.shares = shares(sources, temperature)
        self._schedule = functools.lru_cache(maxsize=64)(self._make_schedule)
        self._order = functools.lru_cache(maxsize=2 * len(sources))(self._make_order)
        self._phases, self.draws = self._plan()
        """`draws`: how many there are in all, None = no end."""

    def at(self, draw: int) -> tuple[int, int]:
        """(source, position in that source) of draw number `draw`. Raises `DataExhausted` past the end."""
        if draw < 0:
            raise ValueError(f"draw {draw} is negative; draws count from 0")
        if self.draws is not None and draw >= self.draws:
            raise DataExhausted(f"draw {draw}: the sources allow {self.draws} draws in all; raise repeats or take fewer steps")
        number = bisect_right(self._phases, draw, key=lambda p: p.first) - 1
        phase = self._phases[number]
        period, slot = divmod(draw - phase.first, PERIOD)
        who, rank = self._schedule(number, period)
        local, source = int(who[slot]), phase.active[int(who[slot])]
        return source, int(phase.drawn[source] + period * phase.slots[local] + rank[slot])

    def unit(self, source: int, position: int) -> int:
        """The unit of `source` at `position` of its endless row of shuffled passes."""
        run, place = divmod(position, self.sources[source].units)
        return int(self._order(source, run)[place])

    def _make_order(self, source: int, run: int) -> np.ndarray:
        order = permutation(self.sources[source].units, self.seed, "order", self.sources[source].name, run)
        return order.astype(np.uint32) if len(order) < 2**32 else order

    def _make_schedule(self, number: int, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Per slot of the period: index of the active source, and how many of its slots came before."""
        count = self._phases[number].slots if number < len(self._phases) else self._next.slots
        who = np.repeat(np.arange(len(count)), count)
        rank = np.arange(PERIOD) - np.repeat(np.cumsum(count) - count, count)
        when = (rank + uniforms(PERIOD, self.seed, "schedule", number, period)) / count[who]
        order = np.argsort(when, kind="stable")
        ranks = np.empty(PERIOD, np.int64)
        for k in range(len(count)):  # ranks follow the order in time
            mine = np.flatnonzero(who[order] == k)
            ranks[mine] = np.arange(len(mine))
        return who[order], ranks

    def _plan(self) -> tuple[list[_Phase], int | None]:
        """Phases between the ends of sources, computed once; exact to the draw."""
        self._phases = []
        drawn, first = np.zeros(len(self.sources), np.int64), 0
        active = tuple(range(len(self.sources)))
        while active:
            count = slots(self.shares[list(active)])
            self._next = _Phase(first, active, count, drawn)
            ends = self._end(len(self._phases))
            self._phases.append(self._next)
            if ends is None:
                return self._phases, None
            first, drawn = first + ends[0], ends[1]
            active = tuple(k for k in active if self.sources[k].limit is None or drawn[k] < (self.sources[k].limit or 0))
        return self._phases, first

    def _end(self, number: int) -> tuple[int, np.ndarray] | None:
        """Draws until the first active source of `_next` is used up, and the positions drawn by then; None = never."""
        phase = self._next
        left = {
            i: limit - int(phase.drawn[k]) for i, k in enumerate(phase.active) if (limit := self.sources[k].limit) is not None
        }
        if not left:
            return None
        period = min((n - 1) // int(phase.slots[i]) for i, n in left.items())
        who, rank = self._schedule(number, period)
        stop = PERIOD
        for i, n in left.items():
            last = n - 1 - period * int(phase.slots[i])
            hit = np.flatnonzero((who == i) & (rank == last))
            stop = min(stop, int(hit[0]) + 1 if len(hit) else PERIOD)
        drawn = phase.drawn.copy()
        for i, k in enumerate(phase.active):
            drawn[k] += period * phase.slots[i] + int((who[:stop] == i).sum())
        return period * PERIOD + stop, drawn
