"""FlexAttention's BlockMask from key lifetimes.

In: born and dies [T] and their extremes per key tile. Out: a BlockMask whose skip / full / partial lists come from
(T / size)^2 compares; `create_block_mask` would evaluate T^2 mask values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from weft.kernels.tiles import KeyTiles


def block_mask(born: Tensor, dies: Tensor, tiles: KeyTiles) -> BlockMask:
    """BlockMask [1, 1, T, T] of the interval mask. The last tile counts as partial where it is short."""
    total, size = len(born), tiles.size
    first = torch.arange(len(tiles.born_min), device=born.device, dtype=torch.int32)[:, None] * size
    end = torch.clamp(first + size, max=total)
    seen = (tiles.born_min < end) & (tiles.dies_max > first)
    full = (tiles.born_max <= first) & (tiles.dies_min >= end)
    if total % size:
        full[-1], full[:, -1] = False, False
    partial_count, partial_index = _lists(seen & ~full)
    full_count, full_index = _lists(full)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (born[key] <= query) & (query < dies[key])

    return BlockMask.from_kv_blocks(
        partial_count, partial_index, full_count, full_index, BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=(total, total)
    )


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count and indices (chosen ones first, in order) of the key tiles of each query tile, with batch and head axes of 1."""
    order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(1, dtype=torch.int32)[None, None], order[None, None].contiguous()
