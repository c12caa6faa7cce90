"""The attention layer: fused q/k/v projection, QK-norm, three-axis rotary positions, grouped queries.

In: normed tokens [T D], the batch's cos and sin, and a `StreamLayout` (training); `project_rows` serves `extend.py`.
Out: [T D]. QK-norm is what keeps one set of weights stable across modalities of different entropy (Chameleon, arXiv
2405.09818, section 2.3); it is RMSNorm per head here.

Axes: `T tokens  D width  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from weft.kernels.attention import attention
from weft.kernels.fused import norm_rope_rows
from weft.kernels.layout import StreamLayout
from weft.kernels.norm_rope import qk_norm_rope
from weft.kernels.rotary import Rotary
from weft.model.config import ModelConfig


class Attention(nn.Module):
    """Weights of one layer's attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.eps = config.norm_eps
        inner = config.heads * config.head_width
        self.qkv = nn.Linear(config.width, inner + 2 * config.kv_heads * config.head_width, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.q_norm = nn.Parameter(torch.ones(config.head_width))
        self.k_norm = nn.Parameter(torch.ones(config.head_width))

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[T D] -> q [T H K] and k [T G K], normed and turned, and v [T G K]."""
        qkv = self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, self.head_width)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, *rotary, self.eps)
        return q, k, v

    def project_rows(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """The same without gradients and in few calls: q [T H K], and keys beside values [T 2 G K].

        On a CPU `rotary` comes from `fused.whole_turn`."""
        if x.device.type != "cpu":
            q, k, v = self.project(x, rotary)
            return q, torch.stack([k, v.to(k.dtype)], 1)
        qkv = self.qkv(x).view(len(x), -1, self.head_width)
        turned = self.heads + self.kv_heads
        qkv = norm_rope_rows(qkv, self.heads, turned, self.q_norm, self.k_norm, *rotary, self.eps)
        return qkv[:, : self.heads], qkv[:, self.heads :].view(len(x), 2, self.kv_heads, self.head_width)

    def forward(self, x: Tensor, rotary: Rotary, layout: StreamLayout) -> Tensor:
        """[T D] -> [T D]."""
        q, k, v = self.project(x, rotary)
        if x.device.type == "cpu":  # the fused CPU kernel's backward is 2.6x slower in bfloat16 than in float32 (measured)
            with torch.autocast("cpu", enabled=False):
                mixed = attention(q, k, v.to(q.dtype), layout)
        else:
            mixed = attention(q, k.to(q.dtype), v.to(q.dtype), layout)
        return self.out(mixed.flatten(1).to(x.dtype))

    @torch.no_grad()
    def logit_bound(self) -> Tensor:
        """The largest logit that any query and key can reach: |q| |k| / sqrt K with |q| <= sqrt K max |gain|. A monitor."""
        return math.sqrt(self.head_width) * self.q_norm.abs().max() * self.k_norm.abs().max()
