"""Attention through torch's FlexAttention, compiled, with a block mask made from the key lifetimes.

In: q [T H K], k and v [T G K], a layout. Out: [T H K], and on a GPU the log-sum-exp [T H].
On a CPU FlexAttention has no backward, so there it serves inference only. A recompile limit is an error here: torch would go on
in an unfused O(T^2) path with no more than a warning.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout

TILE = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """On a CPU: forward only, without the log-sum-exp. Never float64."""
    if q.dtype not in DTYPES:
        return f"does not compute in {q.dtype}"
    if q.device.type not in ("cpu", "cuda"):
        return f"has no kernel for {q.device.type}"
    if q.device.type == "cpu":
        if return_lse:
            return "does not give the log-sum-exp on a CPU"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "has no backward on a CPU"
        if q.shape[-1] % 16:
            return f"needs a head width that is a multiple of 16 on a CPU, found {q.shape[-1]}"
    elif q.shape[-1] < 16:
        return f"needs a head width of at least 16, found {q.shape[-1]}"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over visible keys."""
    if "flex" not in layout.plans:
        layout.plans["flex"] = layout.to_block_mask(TILE)
    mask = layout.plans["flex"]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        if not return_lse:
            out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1), None
        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return out[0].transpose(0, 1), aux.lse[0].detach().T


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
