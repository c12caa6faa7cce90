"""Attention by query chunks and gathered keys through torch's fused kernels: the CPU path, exact, with gradients.

In: q [T H K], k and v [T G K], a layout. Out: [T H K] and the log-sum-exp [T H]. Work grows with the visible area.
On a CPU the fused flash operator is called forward and backward inside one autograd function, so no gathered copy is kept and
the backward adds into one gradient per tensor. Elsewhere the same pieces go through scaled_dot_product_attention and autograd.

Letters: `n chunks of a piece  c queries of a chunk  w keys of a chunk  R = H / G query heads per kv head`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.chunks import Batched, ChunkPlan, Single, chunk_plan
from weft.kernels.layout import StreamLayout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """Any float dtype on a CPU; elsewhere without the log-sum-exp."""
    if return_lse and q.device.type != "cpu":
        return "gives the log-sum-exp on a CPU only"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over visible keys. No gradient flows through the log-sum-exp."""
    plan = chunk_plan(layout, q.shape[1], k.shape[1], q.shape[2])
    if q.device.type == "cpu":
        out, lse = _ChunkedAttention.apply(q, k, v, plan, scale)
        return out, lse
    return _by_autograd(q, k, v, plan, scale), None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: StreamLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v on a CPU, from what `run` gave."""
    return _gradients(grad, q, k, v, out, lse, chunk_plan(layout, q.shape[1], k.shape[1], q.shape[2]), scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: ChunkPlan, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _empty(q, q.shape[2], q.dtype), _empty(q, 1, _wide(q))
        for piece in plan.pieces:
            part, part_lse = _forward(*_operands(piece, q, k, v), attn_mask=piece.bias(q.dtype), scale=scale)
            _put(out, piece, part)
            _put(lse, piece, part_lse[..., None])
        out, lse = out[:-1].view(q.shape), lse[:-1].view(q.shape[:2])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_gradients(grad, q, k, v, out, lse, ctx.plan, ctx.scale), None, None


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: ChunkPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = _empty(q, q.shape[2], q.dtype)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=_wide(x)) for x in (k, v))  # sums over chunks
    for piece in plan.pieces:
        part_grad, part_out = (_heads(piece, x, k.shape[1]) for x in (grad, out))
        part_lse = _heads(piece, lse[..., None], k.shape[1])[..., 0].contiguous()
        if isinstance(piece, Batched) and piece.padded is not None:
            part_lse.masked_fill_(piece.padded, float("inf"))  # weights exp(score - inf) = 0: no gradient
        operands = (part_grad, *_operands(piece, q, k, v), part_out, part_lse)
        part_q, part_k, part_v = _backward(*operands, 0.0, False, attn_mask=piece.bias(q.dtype), scale=scale)
        _put(grad_q, piece, part_q)
        _add(grad_k, piece, part_k)
        _add(grad_v, piece, part_v)
    return grad_q[:-1].view(q.shape), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _by_autograd(q: Tensor, k: Tensor, v: Tensor, plan: ChunkPlan, scale: float) -> Tensor:
    heads, size = q.shape[1:]
    parts, places = [], []
    for piece in plan.pieces:
        part = F.scaled_dot_product_attention(*_operands(piece, q, k, v), attn_mask=piece.bias(q.dtype), scale=scale)
        parts.append(_rows(piece, part))
        if isinstance(piece, Single):
            places.append(torch.arange(piece.queries.start * heads, piece.queries.stop * heads, device=q.device))
        else:
            places.append(piece.put_q)
    order = torch.argsort(torch.cat(places))[: len(q) * heads]  # rows of padded queries come last
    return torch.cat(parts).index_select(0, order).view(-1, heads, size)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(q: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of every token and head, and one more for padded queries."""
    return q.new_empty((q.shape[0] * q.shape[1] + 1, size), dtype=dtype)


def _heads(piece: Single | Batched, x: Tensor, kv_heads: int) -> Tensor:
    """[T H K] to what the kernel reads: a single chunk [G R c K] in place, a batch [n G R*c K] with R folded into the rows."""
    heads, size = x.shape[1:]
    if isinstance(piece, Single):
        return x[piece.queries].unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)
    return x.reshape(-1, size).index_select(0, piece.take_q).view(piece.shape[0], kv_heads, -1, size)


def _operands(piece: Single | Batched, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(piece, q, k.shape[1]), _keys(piece, k, q.shape[1]), _keys(piece, v, q.shape[1])


def _keys(piece: Single | Batched, x: Tensor, heads: int) -> Tensor:
    """[T G K] to [G R w K] without a copy for the repeats, or [n G w K]."""
    kv_heads, size = x.shape[1:]
    if isinstance(piece, Batched):
        return x.reshape(-1, size).index_select(0, piece.take_k).view(piece.shape[0], kv_heads, -1, size)
    taken = x[piece.keys] if isinstance(piece.keys, slice) else x.index_select(0, piece.keys)
    return taken.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1)


def _rows(piece: Single | Batched, part: Tensor) -> Tensor:
    """The kernel's result as rows of one token and head each, in the order of the piece."""
    part = part.permute(2, 0, 1, 3) if isinstance(piece, Single) else part.transpose(1, 2)
    return part.reshape(-1, part.shape[-1])


def _put(target: Tensor, piece: Single | Batched, part: Tensor) -> None:
    """Write a piece's result into the rows of every token and head."""
    if isinstance(piece, Batched):
        target.index_copy_(0, piece.put_q, _rows(piece, part))
        return
    heads = part.shape[0] * part.shape[1]
    place = target[piece.queries.start * heads : piece.queries.stop * heads]
    place.view(-1, *part.shape[:2], part.shape[-1]).copy_(part.permute(2, 0, 1, 3))


def _add(total: Tensor, piece: Single | Batched, part: Tensor) -> None:
    """Add a piece's key or value gradient to the sum [T G K]."""
    if isinstance(piece, Batched):
        total.index_add_(0, piece.keys, part.transpose(1, 2).reshape(-1, *total.shape[1:]).to(total.dtype))
        return
    rows = part.sum(1, dtype=total.dtype).transpose(0, 1)
    if isinstance(piece.keys, slice):
        total[piece.keys] += rows
    else:
        total.index_add_(0, piece.keys, rows)
