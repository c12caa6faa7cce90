"""The xformers attention bias that says what a layout says, where one can.

In: born and dies [T], document borders, the window. Out: an object of `xformers.ops.fmha.attn_bias`, or NotExpressible.
xformers counts a window as we do: `window` keys, the query itself included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NotExpressible(ValueError):
    """No single bias of xformers says what this layout says."""


def bias(born: Tensor, dies: Tensor, cu_seqlens: Tensor, window: int | None) -> Any:
    """A block-diagonal bias: causal, causal with a window, or two-way over whole documents.

    Raises NotExpressible, and ModuleNotFoundError where xformers is not installed.
    """
    at = torch.arange(len(born), device=born.device, dtype=born.dtype)
    lengths = cu_seqlens.diff()
    start, end = (x.repeat_interleave(lengths) for x in (cu_seqlens[:-1], cu_seqlens[1:]))
    causal, whole = bool((born == at).all()), bool((dies == end).all())
    if not causal and not (whole and bool((born == start).all())):
        raise NotExpressible("xformers has no bias for two-way blocks inside a causal document")
    local = window is not None and bool((dies == torch.minimum(at + window, end)).all())
    if not whole and not local:
        raise NotExpressible("xformers has no bias for landmarks that outlive the window, nor for media that die early")
    masks = _biases()
    sizes = lengths.tolist()
    if not causal:
        return masks.BlockDiagonalMask.from_seqlens(sizes)
    block = masks.BlockDiagonalCausalMask.from_seqlens(sizes)
    return block if whole else block.make_local_attention(window)


def _biases() -> Any:
    try:
        from xformers.ops.fmha import attn_bias
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("xformers is not installed: pip install 'weft[xformers]'") from error
    return attn_bias
