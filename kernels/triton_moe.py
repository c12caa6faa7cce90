"""The routed SwiGLU layer on a GPU: Triton for what surrounds the products, torch's grouped product for the products.

In: tokens [T D], routing weights and experts [T S], the experts' matrices. Out: [T D]. What is fused, and why it pays:
- the sort by expert is a counting sort in two programs and a cumulative sum; nothing is read on the host;
- a token is read once and written to its S rows, the gradient of the output likewise;
- the routing weight is applied with SwiGLU, before the second product. So the sum over a token's experts is a plain gather-sum
  and the weights' gradient falls out of SwiGLU's backward pass: the second product's [N D] result is not kept (SonicMoE, arXiv
  2512.14080, takes that gradient from the same place);
- copies of tokens and SwiGLU's result are made again in the backward pass: [N 2F] is all that is kept per choice.
No atomics: a step repeats to the last bit. The operators carry fake implementations and autograd, so torch.compile passes over
them. docs/kernels.md says what ran on a GPU.

Axes: `T tokens  D width  E experts  S experts per token  F expert width  N = T * S choices`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from weft.kernels.grouped import grouped_matmul, grouped_outer
from weft.kernels.triton_attention import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, EXPERTS = 128, 32  # choices and experts of one counting program
COLUMNS = 1024  # of one copying program
FORWARD = {"ROWS": 4, "COLUMNS": 256}  # of one SwiGLU program; not measured
BACKWARD = {"ROWS": 4, "COLUMNS": 256}
WARPS = 4


def supports(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """NVIDIA GPUs from compute capability 8.0, or any tensor where Triton interprets its programs; None, or why not."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    if x.dtype not in DTYPES or not x.dtype == gate_up.dtype == down.dtype:
        return f"does not compute tokens in {x.dtype} with experts in {gate_up.dtype} and {down.dtype}"
    if interpreted():
        return None
    if x.device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, found {x.device.type} (TRITON_INTERPRET=1 interprets it, slowly)"
    major, minor = torch.cuda.get_device_capability(x.device)
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def run(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T D] as `moe.moe_ffn` says."""
    return _forward(x, weight.float().contiguous(), expert.contiguous(), gate_up, down)[0]


def plan(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [N], place [T S] and rows per expert [E], all int32, of expert [T S]: a stable sort without a sync."""
    from weft.kernels import triton_moe_programs as programs

    total = expert.numel()
    blocks = max(1, -(-total // BLOCK))
    table = expert.new_empty((experts, blocks), dtype=torch.int32)
    order, place = expert.new_empty(total, dtype=torch.int32), torch.empty_like(expert, dtype=torch.int32)
    with torch.cuda.device_of(expert):  # Triton launches on the current device
        grid = (blocks, -(-experts // EXPERTS))
        programs.count[grid](expert, table, total, blocks, experts, BLOCK=BLOCK, EXPERTS=EXPERTS, num_warps=WARPS)
        ends = table.view(-1).cumsum(0, dtype=torch.int32)
        first = ends - table.view(-1)
        programs.arrange[(blocks,)](expert, first, order, place, total, blocks, BLOCK=BLOCK, num_warps=WARPS)
    return order, place, table.sum(1, dtype=torch.int32)


def _spread(x: Tensor, place: Tensor) -> Tensor:
    """Copies of tokens [T D] in the order of rows [N D]."""
    from weft.kernels.triton_moe_programs import spread

    x, out = x.contiguous(), x.new_empty((place.numel(), x.shape[1]))
    with torch.cuda.device_of(x):
        spread[_grid(x)](x, place, out, x.shape[1], CHOICES=place.shape[1], COLUMNS=COLUMNS, num_warps=WARPS)
    return out


def _gather_sum(rows: Tensor, place: Tensor) -> Tensor:
    """The sum of each token's rows [N D] -> [T D]."""
    from weft.kernels.triton_moe_programs import gather_sum

    out = rows.new_empty((len(place), rows.shape[1]))
    with torch.cuda.device_of(rows):
        gather_sum[_grid(out)](rows, place, out, rows.shape[1], CHOICES=place.shape[1], COLUMNS=COLUMNS, num_warps=WARPS)
    return out


def _grid(x: Tensor) -> tuple[int, int]:
    return len(x), -(-x.shape[1] // COLUMNS)


def _swiglu(hidden: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """weight * silu(gate) * up of hidden [N 2F] -> [N F]."""
    from weft.kernels.triton_moe_programs import swiglu_forward

    rows, columns = len(hidden), hidden.shape[1] // 2
    out = hidden.new_empty((rows, columns))
    grid = (-(-rows // FORWARD["ROWS"]), -(-columns // FORWARD["COLUMNS"]))
    with torch.cuda.device_of(hidden):
        swiglu_forward[grid](hidden, weight, order, out, rows, columns, **FORWARD, num_warps=WARPS)
    return out


def _swiglu_backward(grad: Tensor, hidden: Tensor, weight: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [N 2F] and weight [T S], and what `_swiglu` gave, from the gradient [N F] of that."""
    from weft.kernels.triton_moe_programs import swiglu_backward

    rows, columns = grad.shape
    grad_hidden, again, grad_weight = torch.empty_like(hidden), torch.empty_like(grad), torch.empty_like(weight)
    tensors = (hidden, grad, weight, order, grad_hidden, again, grad_weight)
    with torch.cuda.device_of(hidden):
        swiglu_backward[(-(-rows // BACKWARD["ROWS"]),)](*tensors, rows, columns, **BACKWARD, num_warps=WARPS)
    return grad_hidden, again, grad_weight


Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("weft::moe_ffn", mutates_args=())
def _forward(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> Kept:
    """out [T D], and what the backward pass reads: hidden [N 2F], order [N], place [T S], rows per expert [E]."""
    if not len(x):
        return _empty(x, weight, expert, gate_up, down)
    order, place, counts = plan(expert, len(gate_up))
    hidden = grouped_matmul(_spread(x, place), gate_up, counts)
    rows = grouped_matmul(_swiglu(hidden, weight, order), down, counts)
    return _gather_sum(rows, place), hidden, order, place, counts


@_forward.register_fake
def _empty(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> Kept:
    integers = expert.new_zeros(expert.numel(), dtype=torch.int32), torch.empty_like(expert, dtype=torch.int32)
    hidden = x.new_empty((expert.numel(), gate_up.shape[1]))
    return torch.empty_like(x), hidden, *integers, expert.new_zeros(len(gate_up), dtype=torch.int32)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("weft::moe_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor, order: Tensor, place: Tensor,
    counts: Tensor,
) -> Gradients:  # fmt: skip
    if not len(x):
        return torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(gate_up), torch.zeros_like(down)
    sent = _spread(grad, place)
    act_grad = grouped_matmul(sent, down.transpose(1, 2), counts)
    hidden_grad, act, weight_grad = _swiglu_backward(act_grad, hidden, weight, order)
    down_grad = grouped_outer(sent, act, counts)
    del sent, act, act_grad
    gate_up_grad = grouped_outer(hidden_grad, _spread(x, place), counts)
    x_grad = _gather_sum(grouped_matmul(hidden_grad, gate_up.transpose(1, 2), counts), place)
    return x_grad, weight_grad, gate_up_grad, down_grad


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor, order: Tensor, place: Tensor,
    counts: Tensor,
) -> Gradients:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(gate_up), torch.empty_like(down)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Kept) -> None:
    x, weight, _, gate_up, down = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, gate_up, down, *output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, gate_up, down = _backward(grad, *ctx.saved_tensors)
    return x, weight, None, gate_up, down


_forward.register_autograd(_gradients, setup_context=_save)
