"""QK-norm with rotation, and the write into a cache, as torch operators: `weft::norm_rope`, its gradient, `norm_rope_store`.

Also the face of the CUDA C++ kernels' library (`cuda_library.py`), whose names it passes on. On a GPU they run
`csrc/norm_rope.cuh`; on other devices plain torch, with the same arguments, so that autograd, `opcheck` and
`torch.compile(fullgraph=True)` can be tried anywhere. Sums and angles are float32 (float64 for float64 inputs on a CPU).

Axes: `T tokens  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels.cuda_library import (
    LIBRARY,
    SOURCES,
    VARIABLE,
    BuildError,
    build,
    build_command,
    library_path,
    missing,
    toolkit,
)
from weft.kernels.elementwise import rms_norm
from weft.kernels.rotary import rotate

__all__ = [
    "LIBRARY", "SOURCES", "VARIABLE", "BuildError", "build", "build_command", "library_path", "missing", "toolkit",
    "norm_rope", "norm_rope_store", "qk_norm_rope", "supports",
]  # fmt: skip
WIDTHS = (64, 128)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS_PER_PROCESSOR = 4  # not measured


def supports(q: Tensor, k: Tensor, *weights: Tensor) -> str | None:
    """None if the CUDA kernel can serve q [T H K] and k [T G K], else the reason; weights may be of any floating type."""
    if q.device.type != "cuda":
        return f"needs an NVIDIA GPU, found {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0"
    if q.dtype not in TYPES or q.dtype != k.dtype:
        return f"computes in float32, bfloat16 or float16, found {q.dtype} and {k.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"needs a head width of 64 or 128, found {q.shape[-1]}"
    return missing()


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the head width, then rotation, in one pass over memory each. q [T H K], k [T G K], weights [K], cos and sin
    [T K/2]. Under autocast the inputs are taken as they come. Raises RuntimeError where `supports` gives a reason."""
    if not torch.compiler.is_compiling():  # a compiled call is checked where it runs
        _demand(q, k)
    return norm_rope(q, q_weight, cos, sin, eps), norm_rope(k, k_weight, cos, sin, eps)


def _demand(q: Tensor, k: Tensor) -> None:
    reason = supports(q, k)
    if reason:
        raise RuntimeError(f"the CUDA kernel for QK-norm and rotation {reason}")


@torch.library.custom_op("weft::norm_rope", mutates_args=())
def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm over the head width of x [T H K] times weight [K], then rotation by cos, sin [T K/2] -> [T H K], contiguous."""
    wide = _wide(x)
    return rotate(rms_norm(wide, weight.to(wide.dtype), eps), cos, sin).to(x.dtype).contiguous()


@norm_rope.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    _demand(x, x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.weft_cuda.qk_norm_rope(x, *_tables(weight, cos, sin), y, eps, _blocks(x))
    return y


@norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("weft::norm_rope_backward", mutates_args=())
def norm_rope_backward(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x [T H K] and weight [K] for the gradient of the result [T H K]."""
    wide, turned, scale = _wide(x), rotate(_wide(grad), cos, -sin), _wide(weight)
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight_grad = (turned * wide * inverse).sum((0, 1))
    turned = turned * scale
    x_grad = inverse * turned - inverse**3 * wide * (wide * turned).mean(-1, keepdim=True)
    return x_grad.to(x.dtype).contiguous(), weight_grad.to(weight.dtype)


@norm_rope_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _demand(x, grad)
    x = x if x.stride(-1) == 1 else x.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = x.new_zeros((_blocks(x), x.shape[-1]), dtype=torch.float32)
    torch.ops.weft_cuda.qk_norm_rope_backward(grad.contiguous(), x, *_tables(weight, cos, sin), dx, parts, eps)
    return dx, parts.sum(0).to(weight.dtype)


@norm_rope_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None)


norm_rope.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("weft::norm_rope_store", mutates_args=("cache",))
def norm_rope_store(
    k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, cache: Tensor, eps: float
) -> Tensor:
    """Keys normed and turned, written with their values straight to where they are kept -> the keys [T G K].

    k, v [T G K] of one type; weight [K]; cos, sin [T K/2]; slot int64 [T]: token t goes to place slot % PAGE of page
    slot // PAGE of cache [pages 2 G PAGE K], or nowhere where it is -1. Two tokens must not have one slot. No gradient.
    """
    turned = norm_rope(k, weight, cos, sin, eps)
    kept = slot >= 0
    page, place = slot[kept] // cache.shape[3], slot[kept] % cache.shape[3]
    cache[page, :, :, place] = torch.stack([turned, v], 1)[kept].to(cache.dtype)
    return turned


@norm_rope_store.register_kernel("cuda")
def _(k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, cache: Tensor, eps: float) -> Tensor:
    _demand(k, v)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    y = torch.empty_like(k, memory_format=torch.contiguous_format)
    torch.ops.weft_cuda.norm_rope_store(k, v, *_tables(weight, cos, sin), slot.contiguous(), cache, y, eps, _blocks(k))
    return y


@norm_rope_store.register_fake
def _(k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, cache: Tensor, eps: float) -> Tensor:
    return torch.empty_like(k, memory_format=torch.contiguous_format)


def _wide(x: Tensor) -> Tensor:
    """float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def _tables(*tensors: Tensor) -> list[Tensor]:
    return [x.float().contiguous() for x in tensors]


def _blocks(x: Tensor) -> int:
    """Blocks of eight warps that fill the GPU, no more than there are rows."""
    rows = -(-x.shape[0] * x.shape[1] // 8)
    return max(1, min(rows, BLOCKS_PER_PROCESSOR * torch.cuda.get_device_properties(x.device).multi_processor_count))
