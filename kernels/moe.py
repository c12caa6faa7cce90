"""The experts' part of a routed layer: one signature, two backends, and an answer to why which one runs.

In: tokens [T D], their experts and weights [T S], the experts' matrices. Out: [T D], each the weighted sum of its experts.
    torch    sort, copy, product, SwiGLU, product, weighted sum: autograd over library calls
    triton   `triton_moe.py`: everything around the two products fused
The choice: the argument, else `with CHOICE.use(...)`, else the environment variable WEFT_MOE, else "auto", which is torch until
the fused one has been timed on a GPU. A backend that was asked for by name and cannot run is an error.

Axes: `T tokens  D width  E experts  S experts per token  F expert width  N = T * S choices`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.kernels.choice import Choice, ChoiceError
from weft.kernels.fused import swiglu
from weft.kernels.grouped import grouped_matmul

CHOICE = Choice("WEFT_MOE", ("torch", "triton"), auto="torch")


class MoEError(ValueError):
    """Shapes that do not fit."""


def why(x: Tensor, gate_up: Tensor, down: Tensor) -> list[tuple[str, str]]:
    """Each backend with "runs" or the reason why it does not, in the order in which "auto" asks them."""
    return [("torch", "runs"), ("triton", _triton(x, gate_up, down) or "runs")]


def moe_ffn(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """out[t] = sum over s of weight[t, s] * down[e] (silu(gate) * up), with gate and up = gate_up[e] x[t] and e = expert[t, s].

    x [T D]; weight, expert (int64) [T S]; gate_up [E 2F D], rows 0..F the gate; down [E D F]. Gradients reach x, weight and
    both matrices, zero for an expert without tokens. Under autocast float32 inputs are computed in the autocast type.

    Raises MoEError for shapes that do not fit and ChoiceError for a named backend that does not exist or support the call.
    """
    _check(x, weight, expert, gate_up, down)
    name, kind = CHOICE.pick(backend), x.device.type
    if name == "torch":
        return composed(x, weight, expert, gate_up, down)
    if torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        x, gate_up, down = (y.to(lower) if y.dtype == torch.float32 else y for y in (x, gate_up, down))
    reason = _triton(x, gate_up, down)
    if reason:
        raise ChoiceError(f"MoE backend 'triton' was asked for but {reason}; use backend='auto' or see why()")
    from weft.kernels.triton_moe import run

    with torch.autocast(kind, enabled=False):
        return run(x, weight, expert, gate_up, down)


def composed(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`moe_ffn` as a composition of library calls."""
    order, place, counts = sort_by_expert(expert, len(gate_up))
    rows = Dispatch.apply(x, order // expert.shape[1], place)
    hidden = swiglu(grouped_matmul(rows, gate_up, counts))
    return Combine.apply(grouped_matmul(hidden, down, counts), weight, order, place)


def sort_by_expert(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert [T S] -> order [N], the choice of each row; place [T S], the row of each choice; rows per expert [E]. int64."""
    flat = expert.flatten()
    order = torch.argsort(flat, stable=True)
    if flat.device.type == "cpu":
        counts = torch.bincount(flat, minlength=experts)
    else:  # bincount waits for the largest value
        counts = flat.new_zeros(experts).index_add_(0, flat, torch.ones_like(flat))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place.view_as(expert), counts


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


def _triton(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    from weft.kernels import triton_moe

    return triton_moe.supports(x, gate_up, down)


def _check(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, expert {tuple(expert.shape)}"
    if x.ndim != 2 or expert.ndim != 2 or weight.shape != expert.shape or len(x) != len(expert):
        raise MoEError(f"moe_ffn needs x [T D], weight and expert [T S]; found {shapes}")
    shapes = f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}"
    fits = gate_up.ndim == 3 and down.shape == (len(gate_up), x.shape[1], gate_up.shape[1] // 2)
    if not fits or gate_up.shape[1] % 2 or gate_up.shape[2] != x.shape[1]:
        raise MoEError(f"moe_ffn needs x [T D], gate_up [E 2F D] and down [E D F]; found {shapes}")
