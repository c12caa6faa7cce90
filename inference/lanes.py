"""Caches of several documents in one fixed buffer, so that a decoding step has fixed addresses and few shapes.

In: `StreamCache`s that were filled by `Transformer.extend`. Each is given a lane: its stores become views of the buffer, so
that everything that reads or writes the cache goes on working, and a step over all lanes sees the same keys. A cache that
outgrows its lane, or a clone of one, simply has memory of its own again and is given a lane anew when it is next decoded.

Axes: `B lanes  G kv heads  S slots  K head width`; a buffer is [layers 2 B G S K].
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.model.cache import StreamCache

KINDS = ("local", "full")
LEAST_SLOTS = 128


class Lanes:
    """A buffer for `size` documents of at most `slots` live keys a layer; the last slot is where idle lanes write."""

    def __init__(self, like: StreamCache, size: int, slots: dict[str, int]) -> None:
        self.size, self.slots = size, slots
        self.data: dict[str, Tensor] = {}
        self.views: dict[str, list[Tensor]] = {}
        for kind in KINDS:
            layers, two, groups, _, width = getattr(like, kind).data.shape
            data = getattr(like, kind).data.new_zeros((layers, two, size, groups, slots[kind], width))
            self.data[kind] = data
            self.views[kind] = [data[:, :, lane] for lane in range(size)]
        self.owners: list[weakref.ref[StreamCache] | None] = [None] * size
        self.graph: Any = None
        """What a GPU has recorded for these addresses."""

    def lane_of(self, cache: StreamCache) -> int | None:
        """Where `cache` lies in this buffer; None if its memory is elsewhere."""
        for lane, owner in enumerate(self.owners):
            if owner is not None and owner() is cache:
                held = all(getattr(cache, kind).data is self.views[kind][lane] for kind in KINDS)
                return lane if held else None
        return None

    def used(self, kind: str) -> int:
        """Most live slots of any cache that lies here."""
        living = [cache for owner in self.owners if owner is not None and (cache := owner()) is not None]
        return max((getattr(cache, kind).used for cache in living), default=0)

    @property
    def is_free(self) -> bool:
        """No living cache has its memory here."""
        return all(owner is None or (cache := owner()) is None or self.lane_of(cache) is None for owner in self.owners)

    def adopt(self, caches: Sequence[StreamCache]) -> None:
        """Give each cache a lane and copy what it holds."""
        for lane, cache in enumerate(caches):
            for kind in KINDS:
                store, view = getattr(cache, kind), self.views[kind][lane]
                view[:, :, :, : store.used] = store.data[:, :, :, : store.used]
                store.data = view
            self.owners[lane] = weakref.ref(cache)
        self.owners[len(caches) :] = [None] * (self.size - len(caches))


def slots_for(caches: Sequence[StreamCache]) -> dict[str, int]:
    """Slots a layer for the next tokens of these caches, with room to grow: powers of two, so that there are few shapes."""
    most = {kind: max(getattr(cache, kind).used for cache in caches) for kind in KINDS}
    return {kind: max(LEAST_SLOTS, 1 << (most[kind] * 3 // 2 + 1).bit_length()) for kind in KINDS}


def lanes_for(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def steps_of(caches: Sequence[StreamCache], landmark: Sequence[bool]) -> list[dict[str, Any]]:
    """How each store changes by one token, per cache; nothing is changed yet."""
    return [
        {kind: getattr(cache, kind).change(1, [0] if mark else []) for kind in KINDS} for cache, mark in zip(caches, landmark)
    ]


def fits(lanes: Lanes, changes: Sequence[dict[str, Any]]) -> bool:
    """Whether every store still fits after its change, the idle slot left alone."""
    return all(change[kind].used < lanes.slots[kind] for change in changes for kind in KINDS)


def idle(lanes: Lanes, device: torch.device) -> dict[str, Tensor]:
    """Slot to write and number of slots seen for lanes without a token, int64 [B] each: one that sees nothing would be NaN."""
    out = {}
    for kind in KINDS:
        out[f"{kind}_at"] = torch.full((lanes.size,), lanes.slots[kind] - 1, dtype=torch.int64, device=device)
        out[f"{kind}_seen"] = torch.ones(lanes.size, dtype=torch.int64, device=device)
    return out
