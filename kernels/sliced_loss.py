"""Cross-entropy where each token's softmax runs over its own slice of the vocabulary only.

In: hidden states [N D], the output matrix [V D], targets [N] and the number of each token's slice [N]. Out: the loss of each
token and log^2 Z. A position's slice is known from the stream, so the other logits are never computed: less work, less memory.
Every slice takes part in one fixed order even when no token is in it: the gradient of `weight` is always a full matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = (
    8 << 20
)  # logits that exist at one time; smaller blocks are slower (4 MiB by 5 %, 1 MiB by 20 %), larger ones not faster
MIN_ROWS = 64  # a block has at least so many tokens
KEEP_BYTES = 256 << 20  # probabilities kept for the backward pass; past this they are computed again

Slices = Sequence[tuple[int, int]]


def sliced_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    slice_index: Tensor,
    slices: Slices,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    keep_bytes: int = KEEP_BYTES,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(loss [N], log^2 Z [N]) in float32 (float64 for float64 input), both with gradients.

    hidden [N D], weight [V D], target [N] ids in the whole vocabulary, slice_index [N] numbers into `slices`, slices
    ((first id, one past the last id), ...). label_smoothing: this share of the target's mass is spread over its slice.
    z_loss: this factor times log^2 Z is added to the loss (Z: the softmax's denominator; PaLM, section 5).
    backend: "torch", "triton", or "auto", which is torch until the Triton program has been run and timed on a GPU.

    Raises ValueError for a target outside its slice (checked on a CPU, not while torch.compile traces), a slice outside the
    matrix, or shapes that do not fit.
    """
    _check(hidden, weight, target, slice_index, slices)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        hidden, weight = (x.to(lower) if x.dtype == torch.float32 else x for x in (hidden, weight))
    with torch.autocast(kind, enabled=False):
        if _by_triton(hidden, weight, backend):
            from weft.kernels.triton_sliced_loss import run

            return run(hidden, weight, target, slice_index, slices, label_smoothing, z_loss)
        keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _SlicedLoss.apply(
            hidden, weight, target, slice_index, tuple(slices), label_smoothing, z_loss, keep_bytes if keep else 0
        )


def _by_triton(hidden: Tensor, weight: Tensor, backend: str) -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"sliced loss backend {backend!r} is unknown; choose one of auto, torch, triton")
    if backend != "triton":
        return False
    from weft.kernels.triton_sliced_loss import supports

    reason = supports(hidden, weight)
    if reason:
        raise ValueError(f"sliced loss backend 'triton' was asked for but {reason}; use backend='auto'")
    return True


@dataclass(frozen=True)
class _Block:
    """Some tokens of one slice."""

    tokens: Tensor  # int64 [n]
    first: int
    end: int


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, slice_index: Tensor, slices: Slices, smoothing: float,
        z_loss: float, keep_bytes: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = _wide(hidden)
        nll = hidden.new_zeros(len(hidden), dtype=wide)
        log_z = torch.zeros_like(nll)
        blocks = list(_blocks(slice_index, slices, wide))
        kept: list[Tensor | None] = []
        for block in blocks:
            logits = _logits(hidden, weight, block)
            z = torch.logsumexp(logits, 1)
            picked = logits.gather(1, (target[block.tokens] - block.first)[:, None])[:, 0]
            loss = z - (1 - smoothing) * picked - (smoothing * logits.mean(1) if smoothing else 0)
            nll.index_copy_(0, block.tokens, loss)
            log_z.index_copy_(0, block.tokens, z)
            keep_bytes -= logits.numel() * hidden.element_size()
            kept.append(logits.sub_(z[:, None]).exp_().to(hidden.dtype) if keep_bytes >= 0 else None)
        ctx.save_for_backward(hidden, weight, target, log_z)
        ctx.blocks, ctx.kept, ctx.smoothing, ctx.z_loss = blocks, kept, smoothing, z_loss
        return nll + z_loss * log_z**2 if z_loss else nll, log_z**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_square: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, log_z = ctx.saved_tensors
        grad_log_z = 2 * log_z * (grad_square + ctx.z_loss * grad_loss)  # through log^2 Z, both outputs
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for number, block in enumerate(ctx.blocks):
            loss, square = grad_loss[block.tokens], grad_log_z[block.tokens]
            probability = ctx.kept[number]
            ctx.kept[number] = None
            if probability is None:
                probability = _logits(hidden, weight, block).sub_(log_z[block.tokens, None]).exp_().to(hidden.dtype)
            signal = probability.mul_((loss + square).to(hidden.dtype)[:, None])
            if ctx.smoothing:
                signal.sub_((loss * (ctx.smoothing / (block.end - block.first))).to(hidden.dtype)[:, None])
            picked = (target[block.tokens] - block.first)[:, None]
            signal.scatter_add_(1, picked, (-(1 - ctx.smoothing) * loss).to(hidden.dtype)[:, None])
            rows = weight[block.first : block.end].to(hidden.dtype)
            grad_hidden.index_copy_(0, block.tokens, signal @ rows)
            _add_product(grad_weight[block.first : block.end], signal, hidden[block.tokens])
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _add_product(total: Tensor, signal: Tensor, rows: Tensor) -> None:
    """total += signal^T rows, without a temporary of the slice's size where the types agree."""
    if total.dtype == rows.dtype:
        total.addmm_(signal.T, rows)
    else:
        total += signal.T @ rows


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(slice_index: Tensor, slices: Slices, wide: torch.dtype) -> Iterator[_Block]:
    """Tokens sorted by slice, cut so that a block's logits fit into BLOCK_BYTES. Slices without tokens give an empty block."""
    order = torch.argsort(slice_index, stable=True)
    counts = torch.bincount(slice_index, minlength=len(slices)).tolist()
    for tokens, (first, end) in zip(order.split(counts), slices):
        rows = max(MIN_ROWS, BLOCK_BYTES // ((end - first) * wide.itemsize))
        for part in tokens.split(rows) if len(tokens) else (tokens,):
            yield _Block(part, first, end)


def _logits(hidden: Tensor, weight: Tensor, block: _Block) -> Tensor:
    rows = weight[block.first : block.end].to(hidden.dtype)
    return (hidden[block.tokens] @ rows.T).to(_wide(hidden))


def _check(hidden: Tensor, weight: Tensor, target: Tensor, slice_index: Tensor, slices: Slices) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"sliced loss needs hidden [N D] and weight [V D]; found {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if target.shape != hidden.shape[:1] or slice_index.shape != hidden.shape[:1]:
        shapes = f"{tuple(target.shape)} and {tuple(slice_index.shape)}"
        raise ValueError(f"target and slice_index must be [N] with N = {len(hidden)}; found {shapes}")
    for number, (first, end) in enumerate(slices):
        if not 0 <= first < end <= len(weight):
            raise ValueError(f"slice {number} is ids {first} to {end}, outside the output matrix of {len(weight)} rows")
    if hidden.device.type != "cpu" or len(target) == 0 or torch.compiler.is_compiling():
        return
    low, high = int(slice_index.min()), int(slice_index.max())
    if low < 0 or high >= len(slices):
        raise ValueError(f"slice_index holds {low if low < 0 else high}; there are {len(slices)} slices")
    borders = torch.tensor(list(slices))[slice_index]
    outside = (target < borders[:, 0]) | (target >= borders[:, 1])
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"target {int(target[at])} of token {at} lies outside its slice {tuple(borders[at].tolist())}")
