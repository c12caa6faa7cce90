"""Attention through xformers' memory-efficient operators, where one of its biases says what the layout says.

In: q [T H K], k and v [T G K], a layout. Out: [T H K]. GPU only: xformers has no CPU operator.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout
from weft.kernels.xformers_bias import NotExpressible


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """CUDA, half or single precision, no log-sum-exp, and a layout that one bias can express."""
    if q.device.type != "cuda":
        return f"has no operator for {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"does not compute in {q.dtype}"
    if return_lse:
        return "does not give the log-sum-exp"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'weft[xformers]')"
    bias = _bias(layout)
    return str(bias) if isinstance(bias, NotExpressible) else None


def run(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False) -> tuple[Tensor, None]:
    """Softmax attention over visible keys."""
    from xformers.ops import memory_efficient_attention

    (total, heads, size), kv_heads = q.shape, k.shape[1]
    grouped = (1, total, kv_heads, heads // kv_heads, size)
    k, v = (x[None, :, :, None].expand(grouped) for x in (k, v))
    out = memory_efficient_attention(q.view(grouped), k, v, attn_bias=_bias(layout), scale=scale)
    return out.reshape(total, heads, size), None


def _bias(layout: StreamLayout) -> Any:
    """The layout's bias, or the NotExpressible that says why there is none; found once per layout."""
    if "xformers" not in layout.plans:
        try:
            layout.plans["xformers"] = layout.to_xformers()
        except NotExpressible as reason:
            layout.plans["xformers"] = reason
    return layout.plans["xformers"]
