"""RMSNorm, SwiGLU and QK-norm with rotation as single autograd functions: the CPU path of the model.

In and out: as `elementwise.py` and `rotary.py`, the references, which also run on other devices. Autograd's chain of small
operations passes over memory about three times as often (RMSNorm, one core, T = 4096, D = 256, forward and backward: 4.4 ms
as a chain). Only inputs are kept for the backward pass. Under autocast RMSNorm returns the autocast type, since linear layers
are what read it.

Axes: `T tokens  D width  H heads  K head width  F hidden width`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.kernels import elementwise, rotary

WIDE = (torch.float32, torch.float64)
"""Types in which sums of squares are taken."""


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of x [T D]."""
    kind = x.device.type
    if kind != "cpu" or torch.compiler.is_compiling():
        return elementwise.rms_norm(x, weight, eps)
    if not torch.is_grad_enabled():
        if x.dtype == weight.dtype and x.dtype in WIDE:
            return (x * _inverse_rms(x, eps)).mul_(weight)
        return elementwise.rms_norm(x, weight, eps)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x.dtype
    return _RMSNorm.apply(x, weight, eps, dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [N 2F], the gate first -> [N F]."""
    if gate_up.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return elementwise.swiglu(gate_up)
    return _SwiGLU.apply(gate_up)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the head width, then rotation. q [T H K], k [T G K], weights [K], cos and sin [T K/2]. On a CPU the result
    is float32 or wider."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return rotary.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    if not torch.is_grad_enabled():
        cos, sin = cos[:, None], sin[:, None]
        return _turn(elementwise.rms_norm(_wide(q), q_weight, eps), cos, sin), _turn(
            elementwise.rms_norm(_wide(k), k_weight, eps), cos, sin
        )
    return _NormRope.apply(q, q_weight, cos, sin, eps), _NormRope.apply(k, k_weight, cos, sin, eps)


def whole_turn(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T K/2] -> [T 1 K] each, as `norm_rope_rows` reads them: once per call of the model."""
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def norm_rope_rows(
    qkv: Tensor, heads: int, turned: int, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """Queries, keys and values side by side [T H+2G K]: the first `turned` = H + G heads are normed and turned, values stay.

    For decoding: five calls for all heads, no gradient. cos and sin come from `whole_turn`. The result is float32 or wider and
    may be `qkv` itself, overwritten.
    """
    qkv = _wide(qkv)
    rows = qkv[:, :turned]
    normed = rows * _inverse_rms(rows, eps)
    normed[:, :heads].mul_(q_weight)
    normed[:, heads:].mul_(k_weight)
    swapped = normed.roll(rows.shape[-1] // 2, -1)
    cos, sin = cos.to(rows.dtype), sin.to(rows.dtype)
    torch.addcmul(normed.mul_(cos), swapped, sin, out=rows)
    return qkv


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation in few calls: x [T H K], cos and sin [T 1 K/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], -1)


def _wide(x: Tensor) -> Tensor:
    """float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms over the last axis, which stays with length 1; three calls, where `F.rms_norm` on a CPU makes seven."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if type(x) is not Tensor:  # a fake tensor may not meet a kept one
        return (norm * norm).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.addcmul(_scalar(eps, x.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@functools.cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the CPU, which costs an operation less than a number does."""
    with torch.inference_mode(False):  # it may be made and used in any mode
        return torch.tensor(value, dtype=dtype, device="cpu")


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x * inverse * weight for x and weight, all wide and of shape [N D]; may overwrite `grad`.

    dx = r w g - r^3 x mean(x w g), with r the inverse RMS.
    """
    product = grad * x
    weight_grad = (inverse.T @ product)[0]
    share = (product @ weight)[:, None] * inverse.pow(3).mul_(-1 / x.shape[-1])
    return torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(x, share), weight_grad


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        flat = (_wide(grad).reshape(-1, width), _wide(x).reshape(-1, width), _wide(weight), inverse.view(-1, 1))
        x_grad, weight_grad = _norm_backward(*flat)
        return x_grad.view_as(x).to(x.dtype), weight_grad.to(weight.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        gate_grad, up_grad = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return out


class _NormRope(torch.autograd.Function):
    """x [T H K] -> turn(x * inverse * weight). The weights are folded into the tables, which heads share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, cos, sin, inverse)
        first, second = wide.chunk(2, -1)
        one, two = _wide(weight).chunk(2)
        out = torch.empty_like(wide, memory_format=torch.contiguous_format)
        left, right = out.chunk(2, -1)
        torch.mul(first, (cos * one)[:, None], out=left).addcmul_(second, (sin * two)[:, None], value=-1)
        torch.mul(second, (cos * two)[:, None], out=right).addcmul_(first, (sin * one)[:, None])
        return out.mul_(inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, cos, sin, inverse = ctx.saved_tensors
        left, right = grad.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        turned = torch.empty_like(grad, memory_format=torch.contiguous_format)
        first, second = turned.chunk(2, -1)
        torch.mul(left, cos, out=first).addcmul_(right, sin)
        torch.mul(right, cos, out=second).addcmul_(left, sin, value=-1)
        width = x.shape[-1]
        flat = (turned.view(-1, width), _wide(x).reshape(-1, width), _wide(weight), inverse.reshape(-1, 1))
        x_grad, weight_grad = _norm_backward(*flat)
        return x_grad.view(x.shape).to(x.dtype), weight_grad.to(weight.dtype), None, None, None
