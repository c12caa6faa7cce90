"""One matrix product per expert over rows sorted by expert.

In: x [N D] sorted by expert, weight [E F D], counts [E]. Out: [N F]. Experts without rows take part: their gradient is zero,
not None, and the order of the products never depends on the data. `grouped_outer` is the product in the weights' gradient.

On a CPU this is a loop over experts: within 12 % of `torch.nn.functional.grouped_mm` (forward and backward in float32, E = 4 to
16, N = 2k to 8k, one core, CPU time, both at 81 to 92 GFLOP/s), and it also takes float64. Under autocast it stays in the
weights' type where the CPU only emulates bfloat16 products (11 to 36 times slower than in float32, measured with AVX2), as
torch's grouped product does, which is not on autocast's list.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.kernels.hardware import multiplies_bfloat16

Counts = Tensor | list[int]


def grouped_matmul(x: Tensor, weight: Tensor, counts: Counts, pad_rows_to: int = 1) -> Tensor:
    """x[rows of e] @ weight[e].T for each expert e.

    counts: rows per expert, summing to N; an int tensor [E] or a list. On a CPU the counts are read; on a GPU in half precision
    they stay there. pad_rows_to: each expert's rows are padded with zeros to a multiple of this, so that with 16 a row's result
    has the same bits whatever else is in the batch (inference). Raises ValueError for counts that do not fit.
    """
    if weight.ndim != 3 or x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"grouped_matmul needs x [N D] and weight [E F D]; found {tuple(x.shape)} and {tuple(weight.shape)}")
    if len(counts) != len(weight):
        raise ValueError(f"grouped_matmul needs one count per expert: found {len(counts)} counts, {len(weight)} experts")
    if _emulates(x):
        with torch.autocast("cpu", enabled=False):
            return grouped_matmul(x.to(weight.dtype), weight, counts, pad_rows_to)
    x, weight = _lowered(x), _lowered(weight)
    if pad_rows_to == 1 and _fused(x, weight):
        return _Fused.apply(x, weight, torch.as_tensor(counts, device=x.device))
    sizes = counts.tolist() if isinstance(counts, Tensor) else counts
    if sum(sizes) != len(x):
        raise ValueError(f"counts sum to {sum(sizes)}, x has {len(x)} rows; sort the rows by expert and count all of them")
    parts = zip(x.split(sizes), weight.unbind(0))
    return torch.cat([_product(rows, matrix, pad_rows_to) for rows, matrix in parts])


class _Fused(torch.autograd.Function):
    """torch's grouped product. Its own weight gradient holds garbage for an expert without rows on Blackwell (pytorch issue
    172439), so ours is made by `grouped_outer`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=_ends(counts, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        return F.grouped_mm(grad, weight, offs=_ends(counts, x)), grouped_outer(grad, x, counts), None


def grouped_outer(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """a[rows of e].T @ b[rows of e] for each expert e: a [N P], b [N Q], counts [E] -> [E P Q], zero where e has no rows.
    Raises ValueError for counts that do not fit."""
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ValueError(f"grouped_outer needs a [N P] and b [N Q]; found {tuple(a.shape)} and {tuple(b.shape)}")
    if _fused(a, b):
        out = F.grouped_mm(a.T, b, offs=_ends(counts, a))
        if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) >= (10, 0):
            out.masked_fill_((torch.as_tensor(counts, device=a.device) == 0)[:, None, None], 0)
        return out
    sizes = counts.tolist() if isinstance(counts, Tensor) else counts
    if sum(sizes) != len(a):
        raise ValueError(f"counts sum to {sum(sizes)}, a has {len(a)} rows; sort the rows by expert and count all of them")
    return torch.stack([left.T @ right for left, right in zip(a.split(sizes), b.split(sizes))])


def _emulates(x: Tensor) -> bool:
    """Whether autocast would make products of bfloat16 that this CPU does not have."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and not multiplies_bfloat16(x.device)


def _lowered(x: Tensor) -> Tensor:
    """Under autocast on a GPU, float32 in the autocast type: torch's grouped product is not on autocast's list."""
    if x.device.type != "cuda" or x.dtype != torch.float32 or not torch.is_autocast_enabled("cuda"):
        return x
    return x.to(torch.get_autocast_dtype("cuda"))


def _ends(counts: Counts, x: Tensor) -> Tensor:
    return torch.as_tensor(counts, device=x.device).cumsum(0).to(torch.int32)


def _fused(x: Tensor, weight: Tensor) -> bool:
    """Where torch's grouped product is right and faster: bfloat16 on Hopper and later, strides of multiples of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or weight.dtype != x.dtype or len(x) == 0:
        return False
    if torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    aligned = all(size % 8 == 0 for size in (x.shape[1], *weight.shape[-2 if weight.ndim == 3 else -1 :]))
    return aligned and x.is_contiguous() and (weight.is_contiguous() or weight.transpose(-2, -1).is_contiguous())


def _product(rows: Tensor, matrix: Tensor, pad_rows_to: int) -> Tensor:
    missing = -len(rows) % pad_rows_to
    if not missing:
        return rows @ matrix.T
    return (F.pad(rows, (0, 0, 0, missing)) @ matrix.T)[: len(rows)]
