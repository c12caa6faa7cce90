"""What the Triton attention kernels read instead of a mask: one table row per tile, from a layout's numbers, in O(T).

In: a `StreamLayout` and tile sizes. Out: `IntervalPlan`. A row of a table names a tile and the ranges that it walks through:
    begin .. full_begin   partial tiles: the element test decides
    full_begin .. full_end   full tiles: no mask code
    full_end .. end   partial tiles again
Rows are sorted by work, the longest first, so that the last programs to run are the short ones. A tile outside the ranges is
never visited. Each key's life is cut at `near`: queries before it meet the key in their main range, queries from there on in
their landmark list. So the backward pass walks a plain key tile over about one window of queries, and only gathered landmarks
over whole documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout
from weft.kernels.tiles import tile_extreme

NEVER = 2**31 - 1


@dataclass(frozen=True)
class TileSize:
    """Queries and keys of one tile, and how Triton runs it."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class TileSizes:
    """One size per kernel."""

    forward: TileSize
    query_grad: TileSize
    key_grad: TileSize


@dataclass(frozen=True, eq=False)
class IntervalPlan:
    """All tensors int32 on the layout's device."""

    spans: list[Tensor]
    """born, near, dies and landmark_at, each [T]."""
    tables: list[Tensor]
    """[tiles 7] for forward and query gradient (tile, begin, full_begin, full_end, end, first_landmark, end_landmark), then
    [tiles 5] for the gradient of keys in queries' main ranges and of landmarks beyond it."""


def interval_plan(layout: StreamLayout, sizes: TileSizes) -> IntervalPlan:
    """The plan of a layout for these tile sizes; made once, shared by all layers."""
    key = ("triton", sizes)
    if key not in layout.plans:
        at = torch.arange(len(layout), device=layout.device, dtype=torch.int32)
        covered = torch.searchsorted(
            layout.first_key, at, right=True, out_int32=True
        )  # one past the last main range with key j
        near = torch.minimum(layout.dies, covered)
        tables = [
            _query_table(layout, covered, sizes.forward),
            _query_table(layout, covered, sizes.query_grad),
            _key_table(layout.born, near, sizes.key_grad, len(layout)),
            _landmark_table(layout, near, sizes.key_grad),
        ]
        layout.plans[key] = IntervalPlan([layout.born, near, layout.dies, layout.landmark_at], tables)
    return layout.plans[key]


def _query_table(layout: StreamLayout, covered: Tensor, size: TileSize) -> Tensor:
    """A key tile is full if it lies in the main range of every query of the tile and none of its keys died early (a medium
    that was followed by another one)."""
    union = layout.query_tiles(size.queries)
    begin, end = _down(union.first_key, size.keys), union.end_key
    full_end = _down(tile_extreme(layout.end_key, size.queries, "amin"), size.keys)
    at = torch.arange(1, len(layout) + 1, device=layout.device, dtype=torch.int32)
    after_early_death = torch.cummax(torch.where(layout.dies < covered, at, 0), 0).values
    after_early_death = torch.cat([after_early_death.new_zeros(1), after_early_death]).int()
    full_begin = torch.maximum(tile_extreme(layout.first_key, size.queries, "amax"), after_early_death[full_end.long()])
    return _table(begin, full_begin, full_end, end, size.keys, union.first_landmark, union.end_landmark)


def _key_table(first: Tensor, last: Tensor, size: TileSize, total: int) -> Tensor:
    """Queries [first, last) of each key."""
    low, high = (tile_extreme(first, size.keys, reduce) for reduce in ("amin", "amax"))
    full_end, end = (tile_extreme(last, size.keys, reduce) for reduce in ("amin", "amax"))
    begin = _down(torch.minimum(low, end), size.queries)
    return _table(begin, high, _down(full_end, size.queries), torch.clamp(end, max=total), size.queries)


def _landmark_table(layout: StreamLayout, near: Tensor, size: TileSize) -> Tensor:
    """Tiles of `landmark_at`; places past the last landmark live from NEVER to 0."""
    total = len(layout)
    exists = layout.landmark_at < total
    key = torch.where(exists, layout.landmark_at, 0).long()
    far = exists & (near[key] < layout.dies[key])
    first, last = torch.where(far, near[key], NEVER), torch.where(far, layout.dies[key], 0)
    return _key_table(first, last, size, total)


def _table(begin: Tensor, full_begin: Tensor, full_end: Tensor, end: Tensor, step: int, *more: Tensor) -> Tensor:
    full_begin = -_down(-torch.clamp(full_begin, max=NEVER - step), step)
    none = full_begin >= full_end
    full_begin, full_end = torch.where(none, begin, full_begin), torch.where(none, begin, full_end)
    tile = torch.arange(len(begin), device=begin.device, dtype=torch.int32)
    work = end - begin + (more[1] - more[0] if more else 0)
    order = torch.argsort(work, descending=True, stable=True)
    return torch.stack([tile, begin, full_begin, full_end, end, *more], 1)[order].contiguous()


def _down(x: Tensor, step: int) -> Tensor:
    """Rounded down to a multiple of `step`."""
    return torch.div(x, step, rounding_mode="floor") * step
