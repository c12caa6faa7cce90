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

from weft.kernels.chunks import ChunkPlan, Piece, chunk_plan
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


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: ChunkPlan, scale: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty(q.shape[:2], dtype=wide)
        for piece in plan.pieces:
            repeat = q.shape[1] // k.shape[1]
            part, part_lse = _forward(*_operands(piece, q, k, v), attn_mask=piece.bias(q.dtype, repeat), scale=scale)
            _put(out, piece, _rows(part, piece, q.shape[1]))
            _put(lse, piece, _rows(part_lse[..., None], piece, q.shape[1])[..., 0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wide = q.dtype if q.dtype == torch.float64 else torch.float32  # a key's gradient is a sum over chunks
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        for piece in ctx.plan.pieces:
            heads = _heads(piece, grad, k.shape[1])
            if piece.padded is not None:
                heads = heads.masked_fill(_padding(piece, heads), 0)
            bias = piece.bias(q.dtype, q.shape[1] // k.shape[1])
            part_lse = _heads(piece, lse[..., None], k.shape[1])[..., 0].contiguous()
            operands = (heads, *_operands(piece, q, k, v), _heads(piece, out, k.shape[1]), part_lse)
            part_q, part_k, part_v = _backward(*operands, 0.0, False, attn_mask=bias, scale=ctx.scale)
            _put(grad_q, piece, _rows(part_q, piece, q.shape[1]), last=False)
            _add(grad_k, piece, part_k)
            _add(grad_v, piece, part_v)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _by_autograd(q: Tensor, k: Tensor, v: Tensor, plan: ChunkPlan, scale: float) -> Tensor:
    parts, places = [], []
    for piece in plan.pieces:
        mask = piece.bias(q.dtype, q.shape[1] // k.shape[1])
        part = F.scaled_dot_product_attention(*_operands(piece, q, k, v), attn_mask=mask, scale=scale)
        keep = slice(None) if piece.padded is None else ~piece.padded
        parts.append(_rows(part, piece, q.shape[1])[keep])
        at = torch.arange(len(q), device=q.device)
        places.append(_take(at, piece.queries)[keep])
    return torch.cat(parts).index_select(0, torch.argsort(torch.cat(places)))


def _take(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _heads(piece: Piece, x: Tensor, kv_heads: int) -> Tensor:
    """[T H K] to what the kernel reads: a single chunk keeps [G R c K] views, a batch folds R into the rows [n G R*c K]."""
    taken = _take(x, piece.queries)
    heads, size = x.shape[1:]
    if piece.chunks == 1:
        return taken.view(piece.width, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3)
    taken = taken.view(piece.chunks, piece.width, kv_heads, heads // kv_heads, size)
    return taken.permute(0, 2, 3, 1, 4).reshape(piece.chunks, kv_heads, -1, size)


def _operands(piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, size = k.shape[1:]
    pair = []
    for x in (k, v):
        taken = _take(x, piece.keys).view(piece.chunks, piece.depth, kv_heads, size).transpose(1, 2)
        if piece.chunks == 1:
            taken = taken[0, :, None].expand(kv_heads, q.shape[1] // kv_heads, piece.depth, size)
        pair.append(taken)
    return _heads(piece, q, kv_heads), pair[0], pair[1]


def _rows(part: Tensor, piece: Piece, heads: int) -> Tensor:
    """The kernel's result back to [n*c H K]."""
    size = part.shape[-1]
    if piece.chunks == 1:
        return part.permute(2, 0, 1, 3).reshape(piece.width, heads, size)
    kv_heads = part.shape[1]
    part = part.reshape(piece.chunks, kv_heads, heads // kv_heads, piece.width, size)
    return part.permute(0, 3, 1, 2, 4).reshape(-1, heads, size)


def _put(target: Tensor, piece: Piece, rows: Tensor, last: bool = True) -> None:
    """Write the rows of a piece. A padded row repeats its chunk's last query: an equal result forward, none backward."""
    if isinstance(piece.queries, slice):
        target[piece.queries] = rows
    elif last or piece.padded is None:
        target.index_copy_(0, piece.queries, rows)
    else:
        keep = (~piece.padded).nonzero()[:, 0]
        target.index_copy_(0, piece.queries.index_select(0, keep), rows.index_select(0, keep))


def _padding(piece: Piece, heads: Tensor) -> Tensor:
    """Which folded rows are padding: bool [n 1 R*c 1]."""
    assert piece.padded is not None
    rows = piece.padded.view(piece.chunks, piece.width)
    return rows.repeat(1, heads.shape[2] // piece.width)[:, None, :, None]


def _add(total: Tensor, piece: Piece, part: Tensor) -> None:
    """Add a piece's key or value gradient to the sum."""
    if piece.chunks == 1:
        part = part.sum(1)[None] if part.shape[1] > 1 else part.transpose(0, 1)
    rows = part.transpose(1, 2).reshape(-1, *total.shape[1:]).to(total.dtype)
    if isinstance(piece.keys, slice):
        total[piece.keys] += rows
    else:
        total.index_add_(0, piece.keys, rows)
