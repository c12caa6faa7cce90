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
from torch.autograd.function import once_differentiable

from weft.kernels.fused import swiglu
from weft.kernels.grouped import grouped_matmul
from weft.model.router import Gate, Routing, route
from weft.model.rows import ROWS, VECTORS, by_rows, pad_rows


class Experts(nn.Module):
    """The weights of E SwiGLU experts, stacked."""

    def __init__(self, width: int, experts: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(self, x: Tensor, counts: Tensor, stable: bool = False) -> Tensor:
        """Rows [N D] sorted by expert, counts [E] rows of each -> [N D]. `stable`: bits that do not depend on N."""
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
        if self.bias.numel() == 1:
            counts = torch.full((1,), len(x), dtype=torch.int64, device=x.device)
            return self.experts(x, counts), routing
        chosen = routing.expert.flatten()
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.bias.numel())
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place = place.view_as(routing.expert)
        rows = self.experts(Dispatch.apply(x, order // self.experts_per_token, place), counts)
        return Combine.apply(rows, routing.weight, order, place), routing

    def infer(self, x: Tensor, tokens: int) -> Tensor:
        """The first `tokens` rows of x [T' D] -> [T' D], zero below. T' is a multiple of 16, and the rows of each expert are
        filled up to one, so that a row's bits do not depend on which others came along."""
        routing = route(pad_rows(self.gate(x), VECTORS), self.bias, self.experts_per_token)
        if x.device.type == "cpu":
            back, place = self._by_expert(x, routing.expert[:tokens].flatten().tolist())
        else:
            back, place = self._grouped(x, routing.expert[:tokens].flatten())
        back = back[place].view(tokens, self.experts_per_token, -1)
        weight = routing.weight[:tokens].to(back.dtype)[..., None]
        out = torch.zeros_like(x)
        for choice in range(self.experts_per_token):  # one order of sums for any number of tokens
            out[:tokens].addcmul_(back[:, choice], weight[:, choice])
        return out

    def _by_expert(self, x: Tensor, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Rows of the chosen experts only, and where each choice's row is: few calls for few tokens."""
        members: dict[int, list[int]] = {}
        for choice, expert in enumerate(chosen):
            members.setdefault(expert, []).append(choice)
        place, parts, first = [0] * len(chosen), [], 0
        for expert, choices in members.items():
            tokens = [choice // self.experts_per_token for choice in choices]
            tokens += [tokens[0]] * (-len(tokens) % ROWS)
            rows = x.index_select(0, torch.tensor(tokens))
            hidden = by_rows(swiglu, F.linear(rows, self.experts.gate_up_proj[expert]))
            parts.append(F.linear(hidden, self.experts.down_proj[expert]))
            for row, choice in enumerate(choices, first):
                place[choice] = row
            first += len(tokens)
        return torch.cat(parts), torch.tensor(place)

    def _grouped(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The same in one grouped product over padded groups."""
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.bias.numel())
        padded = (counts + ROWS - 1) // ROWS * ROWS
        shift = (torch.cumsum(padded, 0) - padded) - (torch.cumsum(counts, 0) - counts)
        slot = torch.arange(len(order), device=order.device) + shift[chosen[order]]
        rows = x.new_zeros((int(padded.sum()), x.shape[1]))
        rows[slot] = x[order // self.experts_per_token]
        place = torch.empty_like(order)
        place[order] = slot
        return self.experts(rows, padded, stable=True), place


class Dispatch(torch.autograd.Function):
    """Copies of tokens in expert order. The gradient gathers through `place` instead of scattering: no atomics, same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        """x [T D], token [N] of each sorted row, place [T S] of each choice among the sorted rows -> [N D]."""
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        if place.shape[1] == 1:
            return grad.index_select(0, place.flatten()), None, None
        return grad.index_select(0, place.flatten()).view(*place.shape, -1).sum(1), None, None


class Combine(torch.autograd.Function):
    """out[t] = sum over s of weight[t, s] * rows[place[t, s]]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """rows [N D] in expert order, weight [T S], order [N] choice of each row, place [T S] row of each choice -> [T D]."""
        ctx.save_for_backward(rows, weight, order, place)
        back = rows.index_select(0, place.flatten()).view(*place.shape, -1)
        return (back * weight.to(rows.dtype)[..., None]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, order, place = ctx.saved_tensors
        sent = grad.index_select(0, order // place.shape[1])  # [N D]
        weight_grad = (sent * rows).sum(-1).index_select(0, place.flatten()).view_as(weight)
        rows_grad = sent * weight.flatten().index_select(0, order).to(sent.dtype)[:, None]
        return rows_grad, weight_grad.to(weight.dtype), None, None
