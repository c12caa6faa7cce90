"""Extremes of a layout's numbers per tile: what a tiled kernel compares to skip a tile or to leave its mask out.

In: int32 tensors [T]. Out: int32 tensors [tiles], the last tile may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyTiles:
    """Extremes of the lifetimes in each tile of `size` keys: enough to tell skip, full and partial with two compares.

    Against the queries [a, b): skip the tile if `dies_max <= a or born_min >= b`; it is full (no mask) if
    `born_max <= a and dies_min >= b`; else the element test `born <= i < dies` decides.
    """

    size: int
    born_min: Tensor  # int32 [tiles]
    born_max: Tensor  # int32 [tiles]
    dies_min: Tensor  # int32 [tiles]
    dies_max: Tensor  # int32 [tiles]


@dataclass(frozen=True, eq=False)
class QueryTiles:
    """Union of the key ranges of each tile of `size` queries."""

    size: int
    first_key: Tensor  # int32 [tiles], start of the main range
    end_key: Tensor  # int32 [tiles], its end
    first_landmark: Tensor  # int32 [tiles], range in `landmark_at`; a landmark inside the main range is not listed again
    end_landmark: Tensor  # int32 [tiles]


def key_tiles(born: Tensor, dies: Tensor, size: int) -> KeyTiles:
    """Lifetime extremes per tile of `size` keys."""
    low, high = (tile_extreme(born, size, "amin"), tile_extreme(born, size, "amax"))
    return KeyTiles(size, low, high, tile_extreme(dies, size, "amin"), tile_extreme(dies, size, "amax"))


def tile_extreme(values: Tensor, size: int, reduce: str) -> Tensor:
    """Smallest ("amin") or largest ("amax") value of each tile of `size`."""
    tiles = -(-len(values) // size)
    tile = torch.arange(len(values), device=values.device) // size
    out = values.new_zeros(tiles)
    return out.scatter_reduce_(0, tile, values, reduce=reduce, include_self=False)
