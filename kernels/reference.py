"""Attention through the dense mask, in plain torch: the truth that every other backend is held to.

In: q [T H K], k and v [T G K], a layout. Out: [T H K] and the log-sum-exp [T H]. O(T^2) memory; float64 capable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """None: every call is supported."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False) -> tuple[Tensor, Tensor]:
    """Softmax attention over visible keys, in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("ihk,jhk->hij", q, k) * scale
    score = score.masked_fill(~layout.dense_mask(), float("-inf"))
    lse = torch.logsumexp(score.float() if score.dtype in (torch.bfloat16, torch.float16) else score, -1)
    return torch.einsum("hij,jhk->ihk", torch.softmax(score, -1), v), lse.detach().T
