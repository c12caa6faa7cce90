"""Random routed layers for the MoE tests, and the layer written down one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """One routed layer and how its tokens choose: over `used` experts only."""

    tokens: int
    experts: int
    choices: int
    width: int = 24
    hidden: int = 16
    used: tuple[int, ...] = ()


SIZES = {
    "two of five": Size(19, 5, 2),
    "one of four": Size(11, 4, 1),
    "three of seven, more choices than a block": Size(44, 7, 3),
    "four of forty, more experts than a tile": Size(9, 40, 4, width=8, hidden=40),
    "experts without tokens": Size(13, 6, 2, used=(1, 4)),
    "all tokens to one expert": Size(9, 3, 1, used=(2,)),
    "one expert": Size(7, 1, 1, width=40),
    "one token": Size(1, 4, 4),
}


def inputs(size: Size, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x [T D], weight [T S] (float32 or wider), expert [T S], gate_up [E 2F D], down [E D F]; gradients on all but `expert`."""
    used = torch.tensor(size.used or range(size.experts))
    draws = torch.rand(size.tokens, len(used)).argsort(1)[:, : size.choices]
    weight = torch.rand(size.tokens, size.choices, dtype=torch.float64)
    made = [
        torch.randn(size.tokens, size.width, dtype=torch.float64),
        weight / weight.sum(1, keepdim=True),
        used[draws],
        torch.randn(size.experts, 2 * size.hidden, size.width, dtype=torch.float64) * size.width**-0.5,
        torch.randn(size.experts, size.width, size.hidden, dtype=torch.float64) * size.hidden**-0.5,
    ]
    wide = torch.promote_types(dtype, torch.float32)
    kinds = [dtype, wide, torch.int64, dtype, dtype]
    return [x.to(device, kind).requires_grad_(kind.is_floating_point) for x, kind in zip(made, kinds)]


def one_by_one(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, from nothing in `kernels/`."""
    rows = []
    for token, shares, numbers in zip(x, weight, expert.tolist()):
        total = torch.zeros_like(token)
        for share, number in zip(shares, numbers):
            gate, up = (gate_up[number] @ token).chunk(2)
            total = total + share * (down[number] @ (gate * torch.sigmoid(gate) * up))
        rows.append(total)
    return torch.stack(rows) if rows else x[:0]


def wide(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in float64, with gradients of their own."""
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]


def gradients(out: Tensor, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out and the gradients of x, weight, gate_up and down."""
    return [out.detach(), *torch.autograd.grad(out, [x for x in tensors if x.requires_grad], grad.to(out.dtype))]


def hold(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Error against float64 at most 2x that of the composition in the same type; gradients 3x (flash-attention's rule)."""
    for number, (a, b, c) in enumerate(zip(ours, plain, truth)):
        rounding = 2 * torch.finfo(ours[0].dtype).eps * c.norm()
        allowed = (2 if number == 0 else 3) * (b.double() - c).norm() + rounding
        assert (a.double() - c).norm() <= allowed, f"output {number}"
