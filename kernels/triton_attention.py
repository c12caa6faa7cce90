"""Interval attention in Triton, forward and backward: the portable GPU backend of our own.

In: q [T H K], k and v [T G K], a layout. Out: [T H K] and the log-sum-exp [T H]. The kernels read two numbers per key and one
table row per tile (`triton_plan.py`) instead of a mask. They are torch operators with fake implementations and autograd, so
torch.compile passes over them. Checked under Triton's interpreter and compiled for sm_80 and sm_90; docs/kernels.md says what
ran on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout
from weft.kernels.triton_plan import TileSize, TileSizes, interval_plan

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, return_lse: bool = False) -> str | None:
    """NVIDIA GPUs from compute capability 8.0, or any tensor where Triton interprets its programs (for tests)."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    if q.dtype not in DTYPES:
        return f"does not compute in {q.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"needs a head width of {', '.join(map(str, WIDTHS))}, found {q.shape[-1]}"
    if interpreted():
        return None
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, found {q.device.type} (TRITON_INTERPRET=1 interprets it, slowly)"
    major, minor = torch.cuda.get_device_capability(q.device)
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over visible keys. No gradient flows through the log-sum-exp."""
    return attend(q, k, v, layout, scale, tile_sizes(q.shape[-1], q.dtype, major(q)))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: StreamLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `run` gave for a positive scale."""
    sizes = tile_sizes(q.shape[-1], q.dtype, major(q))
    plan, rows = interval_plan(layout, sizes), [_rows(x) for x in (q, k, v)]
    return _backward(grad, *rows, out, lse.T.contiguous(), plan.spans, plan.tables, scale, _numbers(sizes))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, sizes: TileSizes) -> tuple[Tensor, Tensor]:
    """`run` with tile sizes of the caller's choice."""
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    plan = interval_plan(layout, sizes)
    out, lse = _forward(*(_rows(x) for x in (q, k, v)), plan.spans, plan.tables, scale, _numbers(sizes))
    return out, lse.T


def tile_sizes(width: int, dtype: torch.dtype, capability: int) -> TileSizes:
    """Tiles that fit registers and shared memory without spilling (a test reads the machine code). Not tuned on a GPU."""
    if dtype == torch.float32:  # products without tensor cores: larger ones take minutes to compile
        small = TileSize(32, 32, 4, 1)
        if width <= 64:
            return TileSizes(TileSize(64, 32, 4, 1), small, small)
        return TileSizes(TileSize(32, 32, 8, 1), TileSize(16, 32, 8, 1), TileSize(32, 16, 8, 1))
    hopper = capability >= 9
    if width <= 64:
        forward = TileSize(128, 64, 4 if hopper else 8, 3)
        return TileSizes(forward, TileSize(64, 64, 4, 2), TileSize(64 if hopper else 32, 64, 4, 2))
    if hopper:
        return TileSizes(TileSize(128, 64, 8, 3), TileSize(64, 32, 4, 2), TileSize(32, 64, 8, 2))
    return TileSizes(TileSize(128, 32, 8, 2), TileSize(64, 64, 8, 2), TileSize(64, 64, 8, 2))


def interpreted() -> bool:
    """Whether Triton interprets programs on the CPU. It reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def major(x: Tensor) -> int:
    """Major compute capability of the GPU that holds x; 8 elsewhere."""
    return torch.cuda.get_device_capability(x.device)[0] if x.device.type == "cuda" else 8


def _numbers(sizes: TileSizes) -> list[int]:
    """Sizes as a torch operator takes them."""
    return [n for s in (sizes.forward, sizes.query_grad, sizes.key_grad) for n in (s.queries, s.keys, s.warps, s.stages)]


def _rows(x: Tensor) -> Tensor:
    """With channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _options(q: Tensor, size: list[int]) -> dict[str, Any]:
    queries, keys, warps, stages = size
    upcast = interpreted() and q.dtype == torch.bfloat16
    return {"WIDTH": q.shape[2], "QUERIES": queries, "KEYS": keys, "UPCAST": upcast, "num_warps": warps, "num_stages": stages}


def _strides(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
    return [n for x in (q, k, v) for n in x.stride()[:2]]


def _like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return made[0], made[1], made[2]


@torch.library.custom_op("weft::interval_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, spans: list[Tensor], tables: list[Tensor], scale: float, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    from weft.kernels.triton_forward import forward

    total, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((heads, total), dtype=torch.float32)
    born, _, dies, at = spans
    grid = (len(tables[0]) * heads,)
    if total:
        with torch.cuda.device_of(q):  # Triton launches on the current device
            forward[grid](
                q, k, v, out, lse, born, dies, at, tables[0], scale, total, heads, heads // k.shape[1], *_strides(q, k, v),
                **_options(q, sizes[:4]),
            )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, spans: list[Tensor], tables: list[Tensor], scale: float, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[1], q.shape[0]), dtype=torch.float32
    )


@torch.library.custom_op("weft::interval_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: list[Tensor], tables: list[Tensor],
    scale: float, sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from weft.kernels import triton_backward as programs

    total, heads, width = q.shape
    kv_heads = k.shape[1]
    results = _like(q, k, v)
    if not total:
        return results
    grad, share = grad.contiguous(), torch.empty_like(lse)
    born, near, dies, at = spans
    with torch.cuda.device_of(q):
        programs.delta[(-(-total // 64), heads)](out, grad, share, total, heads, WIDTH=width, QUERIES=64)
        common = (q, k, v, grad, lse, share)
        tail = (scale, total, heads, heads // kv_heads, *_strides(q, k, v))
        grid = (len(tables[1]) * heads,)
        programs.query_grad[grid](*common, results[0], born, dies, at, tables[1], *tail, **_options(q, sizes[4:8]))
        options = _options(q, sizes[8:])
        for table, first, last, gather in ((tables[2], born, near, False), (tables[3], near, dies, True)):
            grid = (len(table) * kv_heads,)
            programs.key_grad[grid](*common, *results[1:], first, last, at, table, *tail, GATHER=gather, **options)
    return results


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: list[Tensor], tables: list[Tensor],
    scale: float, sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(q, k, v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, spans, tables, ctx.scale, ctx.sizes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.counts = len(spans), len(tables)
    ctx.save_for_backward(q, k, v, *output, *spans, *tables)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    spans, tables = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    grads = _backward(grad, q, k, v, out, lse, spans, tables, ctx.scale, ctx.sizes)
    return *grads, [None] * len(spans), [None] * len(tables), None, None


_forward.register_autograd(_gradients, setup_context=_save)
