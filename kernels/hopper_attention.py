"""Interval attention for Hopper (sm_90a): forward on wgmma and the copy engine; gradients are those of `cuda_attention`.

In: q [T H K], k and v [T G K] in float16 or bfloat16, K of 64 or 128, a layout. Out: [T H K] and the log-sum-exp [T H]. It
reads the tables of `triton_plan.py`, with tiles of 128 queries and steps of 128 keys (csrc/attention_hopper.cuh). Checked on an
emulator of a GPU's threads and compiled for sm_90a; never chosen by "auto" until it has been timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels import cuda_attention
from weft.kernels.layout import StreamLayout
from weft.kernels.triton_plan import TileSize, TileSizes, interval_plan

OWN, STEP = 128, 128
"""Queries of a block and keys of a step, as csrc/ compiles them."""
TILES = {k: TileSizes(TileSize(OWN, STEP), t.query_grad, t.key_grad) for k, t in cuda_attention.TILES.items()}


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """GPUs of compute capability 9.0, once the CUDA kernels are built."""
    reason = cuda_attention.supports(q, k, v, layout, return_lse)
    if reason is None and torch.cuda.get_device_capability(q.device) != (9, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"needs a GPU of compute capability 9.0, this one has {major}.{minor}"
    return reason


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over visible keys. No gradient flows through the log-sum-exp."""
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    spans, tables = _plan(layout, q.shape[-1])
    out, lse = _forward(*(_rows(x) for x in (q, k, v)), spans, tables, scale)
    return out, lse.T


backward = cuda_attention.backward


def _plan(layout: StreamLayout, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """The spans and tables of `interval_plan`; one more span: `_lives`."""
    plan = interval_plan(layout, TILES[width])
    if "hopper lives" not in layout.plans:
        layout.plans["hopper lives"] = _lives(layout)
    return [*plan.spans, layout.plans["hopper lives"]], plan.tables


def _lives(layout: StreamLayout) -> Tensor:
    """First and last query of each key, int32 [steps 2 STEP], so that a step is one copy; keys past the last see no query."""
    both = torch.stack([layout.born, layout.dies])
    both = torch.nn.functional.pad(both, (0, -len(layout) % STEP))
    return both.unflatten(1, (-1, STEP)).transpose(0, 1).contiguous()


def _rows(x: Tensor) -> Tensor:
    """As the copy engine wants them: tokens a multiple of heads apart, rows on multiples of 16 bytes."""
    fits = x.stride(1) > 0 and x.stride(0) >= x.stride(1) and x.stride(0) % x.stride(1) == 0
    return cuda_attention._rows(x if fits else x.clone(memory_format=torch.contiguous_format))


@torch.library.custom_op("weft::hopper_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, spans: list[Tensor], tables: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    born, _, dies, at, lives = spans
    torch.ops.weft_cuda.attention_hopper(q, k, v, born, dies, at, tables[0], lives, out, lse, scale, OWN, STEP)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spans: list[Tensor], tables: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    spans, tables = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    grads = cuda_attention._backward(grad, q, k, v, out, lse, spans[:4], tables, ctx.scale)
    return *grads, [None] * len(spans), [None] * len(tables), None


_forward.register_autograd(_gradients, setup_context=cuda_attention._save)
