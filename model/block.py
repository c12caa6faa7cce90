"""One layer: attention, then the feed-forward layer that every token takes, plus routed experts (all blocks but the first).

In: the residual stream [T D]. Out: [T D] and the router's decision. Pre-norm: h = x + attention(norm x);
y = h + ffn(norm h) + experts(norm h).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.kernels.fused import rms_norm, swiglu
from weft.kernels.layout import StreamLayout
from weft.kernels.rotary import Rotary
from weft.model.attention import Attention
from weft.model.config import ModelConfig
from weft.model.moe import MoE
from weft.model.router import Routing
from weft.model.rows import by_rows


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[T D] -> [T D]."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) with gate and up in one matrix (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, stable: bool = False) -> Tensor:
        """[T D] -> [T D]. `stable`: bits that do not depend on T, a multiple of `block_rows`."""
        hidden = self.gate_up(x)
        return self.down(by_rows(swiglu, hidden) if stable else swiglu(hidden))


class Block(nn.Module):
    """One layer of the trunk."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        hidden = config.ffn_width(layer)
        self.ffn = SwiGLU(config.width, hidden) if hidden else None
        routed = (config.experts, config.experts_per_token, config.expert_width)
        self.mlp = MoE(config.width, *routed) if config.is_routed(layer) else None

    def forward(self, x: Tensor, rotary: Rotary, layout: StreamLayout) -> tuple[Tensor, Routing | None]:
        """[T D] -> [T D] and the routing of this layer, None without experts."""
        x = x + self.attention(self.attention_norm(x), rotary, layout)
        h = self.ffn_norm(x)
        if self.ffn is not None:
            x = x + self.ffn(h)
        if self.mlp is None:
            return x, None
        routed, routing = self.mlp(h)
        return x + routed, routing

    def feed(self, x: Tensor, tokens: int) -> Tensor:
        """The second half of the layer outside training: x [T' D] is `tokens` tokens and filling up to a multiple of
        `block_rows`; it may be overwritten."""
        h = self.ffn_norm(x)
        if self.ffn is not None:
            x = x + self.ffn(h, stable=True)
        return x if self.mlp is None else self.mlp.infer(h, tokens, into=x)
