"""Interval attention in CUDA C++ for sm_80 and later, forward and backward (csrc/attention*.cuh, on tensor cores).

In: q [T H K], k and v [T G K] in float16 or bfloat16, K of 64 or 128, a layout. Out: [T H K] and the log-sum-exp [T H]. It
reads the tables of `triton_plan.py`, as the Triton kernels do. `weft_cuda::attention_*` write into tensors handed to them; the
operators here own their results, have fake implementations and gradients, and torch.compile passes over them. Checked on an
emulator of a GPU's threads and compiled for sm_80 and sm_90a; docs/kernels.md says what ran on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels import cuda_library
from weft.kernels.layout import StreamLayout
from weft.kernels.triton_plan import TileSize, TileSizes, interval_plan

DTYPES = (torch.bfloat16, torch.float16)
TILES = {
    64: TileSizes(TileSize(128, 64), TileSize(128, 32), TileSize(64, 64)),
    128: TileSizes(TileSize(128, 32), TileSize(64, 64), TileSize(32, 64)),
}
"""Tiles by head width, as csrc/ compiles them: no spills, and two blocks per processor on sm_90. Not tuned on a GPU."""


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """NVIDIA GPUs from compute capability 8.0 on, once the CUDA kernels are built."""
    if q.dtype not in DTYPES:
        return f"computes in float16 or bfloat16, found {q.dtype}"
    if q.shape[-1] not in TILES:
        return f"needs a head width of 64 or 128, found {q.shape[-1]}"
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, found {q.device.type}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major < 8:
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    return cuda_library.missing()


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over visible keys. No gradient flows through the log-sum-exp."""
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    plan = interval_plan(layout, TILES[q.shape[-1]])
    out, lse = _forward(*(_rows(x) for x in (q, k, v)), plan.spans, plan.tables, scale)
    return out, lse.T


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: StreamLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `run` gave for a positive scale."""
    plan, rows = interval_plan(layout, TILES[q.shape[-1]]), [_rows(x) for x in (q, k, v)]
    return _backward(grad, *rows, out, lse.T.contiguous(), plan.spans, plan.tables, scale)


def _rows(x: Tensor) -> Tensor:
    """With channels side by side and rows on multiples of 16 bytes."""
    fits = x.stride(2) == 1 and not any(n % 8 for n in (*x.stride()[:2], x.storage_offset()))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _numbers(size: TileSize, keys: bool = False) -> tuple[int, int]:
    """Rows that a block owns and the step of its walk."""
    return (size.keys, size.queries) if keys else (size.queries, size.keys)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


@torch.library.custom_op("weft::cuda_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, spans: list[Tensor], tables: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    (out,), lse = _like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    born, _, dies, at = spans
    size = _numbers(TILES[q.shape[2]].forward)
    torch.ops.weft_cuda.attention_forward(q, k, v, born, dies, at, tables[0], out, lse, scale, *size)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spans: list[Tensor], tables: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return _like(q)[0], q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("weft::cuda_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: list[Tensor], tables: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ops, sizes = torch.ops.weft_cuda, TILES[q.shape[2]]
    born, near, dies, at = spans
    grad, share = _rows(grad.contiguous()), torch.empty_like(lse)
    queries, keys, values = _like(q, k, v)
    common = (q, k, v, grad, lse, share)
    ops.attention_share(out, grad, share)
    ops.attention_query_grad(*common, born, dies, at, tables[1], queries, scale, *_numbers(sizes.query_grad))
    for table, first, last, gather in ((tables[2], born, near, False), (tables[3], near, dies, True)):
        size = _numbers(sizes.key_grad, keys=True)
        ops.attention_key_grad(*common, first, last, at, table, keys, values, scale, *size, gather)
    return queries, keys, values


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: list[Tensor], tables: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    queries, keys, values = _like(q, k, v)
    return queries, keys, values


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, spans, tables, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.counts = len(spans), len(tables)
    ctx.save_for_backward(q, k, v, *output, *spans, *tables)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    spans, tables = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    grads = _backward(grad, q, k, v, out, lse, spans, tables, ctx.scale)
    return *grads, [None] * len(spans), [None] * len(tables), None


_forward.register_autograd(_gradients, setup_context=_save)
