"""Routed experts without dropping: tokens are sorted by expert, multiplied in groups, and put back.

In: tokens [T D]. Out: [T D], each the weighted sum of its S experts, and the router's decision. Every expert takes part in
every forward, with an empty slice if need be, so that its gradient is zero and never missing.

Names match what DeepSpeed's AutoEP looks for: `blocks.N.mlp.gate`, `blocks.N.mlp.experts.gate_up_proj` [E 2F D] (rows 0..F
gate, F..2F up) and `blocks.N.mlp.experts.down_proj` [E D F]. The shared expert is `blocks.N.ffn`, outside of what it replaces.

Axes: `T tokens  D width  E experts  S experts per token  F expert width  N = T * S choices`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.fused import swiglu
from weft.kernels.grouped import grouped_matmul
from weft.kernels.moe import CHOICE, Combine, Dispatch, moe_ffn, sort_by_expert
from weft.model.router import SMALLEST, Gate, Routing, route
from weft.model.rows import block_rows, by_rows, stable_sigmoid

FEW = 64
"""Choices up to which lists in Python are quicker than tensors."""


class Experts(nn.Module):
    """The weights of E SwiGLU experts, stacked."""

    def __init__(self, width: int, experts: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(self, x: Tensor, counts: Tensor | None, stable: bool = False, routing: Routing | None = None) -> Tensor:
        """Rows [N D] sorted by expert, counts [E] rows of each -> [N D]. `stable`: bits that do not depend on N.
        With `routing`: tokens [T D] -> [T D], the whole layer by `moe_ffn`; here, because engines that divide weights gather
        them when this module is called."""
        if routing is not None:
            return moe_ffn(x, routing.weight, routing.expert, self.gate_up_proj, self.down_proj)
        assert counts is not None
        hidden = grouped_matmul(x, self.gate_up_proj, counts)
        hidden = by_rows(swiglu, hidden) if stable else swiglu(hidden)
        return grouped_matmul(hidden, self.down_proj, counts)


class MoE(nn.Module):
    """Router and experts."""

    bias: Tensor

    def __init__(self, width: int, experts: int, experts_per_token: int, expert_width: int) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.gate = Gate(width, experts)
        self.experts = Experts(width, experts, expert_width)
        self.register_buffer("bias", torch.zeros(experts))

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        """The selection bias keeps float32 under `.to(bfloat16)`: its steps of 0.001 would be lost there."""
        kept = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32 and not self.bias.is_meta:
            self.bias = kept.to(self.bias.device)
        return self

    def route(self, x: Tensor) -> Routing:
        """Tokens [T D] -> their experts."""
        return route(self.gate(x), self.bias, self.experts_per_token)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Tokens [T D] -> [T D] and the routing."""
        routing = self.route(x)
        if CHOICE.pick() == "triton" and isinstance(self.experts, Experts):
            return self.experts(x, None, routing=routing), routing
        if self.bias.numel() == 1:
            counts = torch.full((1,), len(x), dtype=torch.int64, device=x.device)
            return self.experts(x, counts), routing
        order, place, counts = sort_by_expert(routing.expert, self.bias.numel())
        rows = self.experts(Dispatch.apply(x, order // self.experts_per_token, place), counts)
        return Combine.apply(rows, routing.weight, order, place), routing

    def infer(self, x: Tensor, tokens: int, into: Tensor) -> Tensor:
        """Add what the first `tokens` rows of x [T' D] get from their experts to `into` [T' D], in place. T' is a multiple of
        `block_rows`, and the rows of each expert are filled up to one: a row's bits do not depend on who came along."""
        weight, expert = self._choose(x, tokens)
        if x.device.type == "cpu" and expert.numel() <= FEW:
            back, place = self._by_expert(x, expert.flatten().tolist())
        else:
            back, place = self._grouped(x, expert.flatten())
        rows = into[:tokens]
        if weight is None:
            rows += back if place is None else back.index_select(0, place)
            return into
        back = (back if place is None else back.index_select(0, place)).to(rows.dtype).unflatten(0, (tokens, -1))
        for choice in range(self.experts_per_token):  # one order of sums for any number of tokens
            rows.addcmul_(back[:, choice], weight[:, choice].to(rows.dtype))
        return into

    def _choose(self, x: Tensor, tokens: int) -> tuple[Tensor | None, Tensor]:
        """Weights [tokens S 1], None where all are one, and experts [tokens S], as `route` gives them."""
        if self.bias.numel() == 1:
            return None, torch.zeros((tokens, 1), dtype=torch.int64, device=x.device)
        score = stable_sigmoid(self.gate(x))[:tokens].clamp(min=SMALLEST)
        expert = torch.topk(score + self.bias, self.experts_per_token, dim=-1, sorted=False).indices
        if self.experts_per_token == 1:
            return None, expert
        chosen = score.gather(-1, expert)
        return (chosen / chosen.sum(-1, keepdim=True))[..., None], expert

    def _expert(self, rows: Tensor, expert: int) -> Tensor:
        """One expert's rows [N D] -> [N D], N a multiple of `block_rows`."""
        hidden = by_rows(swiglu, F.linear(rows, self.experts.gate_up_proj[expert]))
        return F.linear(hidden, self.experts.down_proj[expert])

    def _by_expert(self, x: Tensor, chosen: list[int]) -> tuple[Tensor, Tensor | None]:
        """Rows of the chosen experts, and where each choice's row is (None: in their order): few calls for few tokens."""
        block = block_rows(x)
        if len(chosen) == self.experts_per_token:  # a single token: what lies below it in x fills the block
            parts = [self._expert(x[:block], expert)[:1] for expert in chosen]
            return parts[0] if len(parts) == 1 else torch.cat(parts), None
        members: dict[int, list[int]] = {}
        for choice, expert in enumerate(chosen):
            members.setdefault(expert, []).append(choice)
        place, parts, first = [0] * len(chosen), [], 0
        for expert, choices in members.items():
            tokens = [choice // self.experts_per_token for choice in choices]
            tokens += [tokens[0]] * (-len(tokens) % block)
            parts.append(self._expert(x.index_select(0, torch.tensor(tokens)), expert))
            for row, choice in enumerate(choices, first):
                place[choice] = row
            first += len(tokens)
        return torch.cat(parts), torch.tensor(place)

    def _grouped(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The same for many tokens: groups filled up in one gather; on a GPU in one grouped product."""
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.bias.numel())
        block = block_rows(x)
        padded = (counts + block - 1) // block * block
        shift = (torch.cumsum(padded, 0) - padded) - (torch.cumsum(counts, 0) - counts)
        slot = torch.arange(len(order), device=order.device) + shift[chosen[order]]
        token = order.new_zeros(int(padded.sum())).index_copy_(0, slot, order // self.experts_per_token)
        rows = x.index_select(0, token)
        place = torch.empty_like(order).index_copy_(0, order, slot)
        if x.device.type != "cpu":
            return self.experts(rows, padded, stable=True), place
        parts = rows.split(padded.tolist())
        return torch.cat([self._expert(part, expert) for expert, part in enumerate(parts) if len(part)]), place
