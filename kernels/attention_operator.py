"""Attention as one registered operator, so that torch.compile takes a caller of `attention` whole.

A backend whose module also has `backward(grad, q, k, v, out, lse, layout, scale)` can run inside it. What such a backend
derives from a layout's values is made when the operator runs, never while it is traced: one graph serves every layout, and a
change of layout is new data, not a new program.

In: q [T H K], k and v [T G K], the tensors of a layout, a scale and a backend's name. Out: [T H K] and the log-sum-exp [T H].
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from weft.kernels.layout import StreamLayout

PASSES = {
    "sdpa": ("weft.kernels.sdpa", ("cpu",)),
    "triton": ("weft.kernels.triton_attention", ("cuda", "cpu")),
    "cuda": ("weft.kernels.cuda_attention", ("cuda",)),
    "hopper": ("weft.kernels.hopper_attention", ("cuda",)),
}
"""Backends with passes of their own: module, and the kinds of device on which it has them."""
NAMES = tuple(field.name for field in fields(StreamLayout) if field.name not in ("window", "plans"))
UNSAFE = (torch.Tag.cudagraph_unsafe,)
"""A recorded graph would go on with the plan of the layout that it was recorded with, whatever is copied to its inputs."""


class AttentionError(ValueError):
    """The call cannot be run: shapes that do not fit, or a backend that refuses it."""


_met: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def has_operator(name: str, kind: str) -> bool:
    """Whether the backend can run as the operator on devices of this kind."""
    return name in PASSES and kind in PASSES[name][1]


def run(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, name: str) -> tuple[Tensor, Tensor]:
    """Softmax attention over visible keys by the backend of this name. No gradient flows through the log-sum-exp."""
    if scale <= 0:  # as in the backends: the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    return operator(q, k, v, [getattr(layout, part) for part in NAMES], scale, name)


@torch.library.custom_op("weft::attention", mutates_args=(), tags=UNSAFE)
def operator(q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """The forward pass. Raises AttentionError where the backend does not support the call."""
    whole, module = _layout(layout), importlib.import_module(PASSES[backend][0])
    reason = module.supports(q, k, v, whole, True)
    if reason:
        raise AttentionError(f"attention backend {backend!r} was asked for but {reason}; use backend='auto' or see why()")
    return module.run(q, k, v, whole, scale, True)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    total, heads, _ = q.shape
    by_head = q.new_empty((heads, total), dtype=wide).T
    return _empty(q), torch.empty_like(by_head, memory_format=torch.contiguous_format) if backend == "sdpa" else by_head


@torch.library.custom_op("weft::attention_backward", mutates_args=(), tags=UNSAFE)
def operator_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: list[Tensor], scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    module = importlib.import_module(PASSES[backend][0])
    return module.backward(grad, q, k, v, out, lse, _layout(layout), scale)


@operator_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: list[Tensor], scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _layout(tensors: list[Tensor]) -> StreamLayout:
    """The layout of these tensors with the plans that were made for it, as long as its first tensor lives.

    It holds other handles of the same memory, so that it does not keep its key alive."""
    found = _met.get(tensors[0])
    if found is None or any(getattr(found, name).data_ptr() != x.data_ptr() for name, x in zip(NAMES, tensors)):
        handles: dict[str, Any] = {name: x.detach() for name, x in zip(NAMES, tensors)}
        found = StreamLayout(**handles, window=None)
        _met[tensors[0]] = found
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, layout, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *layout)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *layout = ctx.saved_tensors
    return *operator_backward(grad, q, k, v, out, lse, layout, ctx.scale, ctx.backend), [None] * len(layout), None, None


operator.register_autograd(_gradients, setup_context=_save)
