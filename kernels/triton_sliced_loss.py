"""The sliced cross-entropy on a GPU: one Triton program per tile of tokens, over the ids of its slice.

In: hidden [N D], weight [V D], targets and slice numbers [N]. Out: three float32 numbers per token, log Z, the target's logit
and the mean logit, from which the loss, z-loss and label smoothing are sums over [N]. Logits are never stored. The backward
pass computes them again and holds the gradient of at most BLOCK_BYTES of them at a time; from that block two library products
make the gradients, so nothing is added by atomics and a step repeats to the last bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.kernels.triton_attention import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_BYTES = 256 << 20  # 2048 tokens of a slice of 65,536 in bfloat16; not measured
ROWS, IDS, STEP, WARPS, STAGES = 128, 128, 64, 8, 3
Slices = Sequence[tuple[int, int]]


def supports(hidden: Tensor, weight: Tensor) -> str | None:
    """NVIDIA GPUs from compute capability 8.0, or any tensor where Triton interprets its programs; None, or why not."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    if hidden.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f"does not compute in {hidden.dtype} with a matrix in {weight.dtype}"
    if interpreted():
        return None
    if hidden.device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, found {hidden.device.type}"
    major, minor = torch.cuda.get_device_capability(hidden.device)
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def run(
    hidden: Tensor, weight: Tensor, target: Tensor, slice_index: Tensor, slices: Slices, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(loss [N], log^2 Z [N]) as `sliced_cross_entropy` says."""
    borders = [border for pair in slices for border in pair]
    log_z, picked, mean, _, _ = _forward(hidden, weight, target, slice_index, borders)
    square = log_z**2
    loss = log_z - (1 - smoothing) * picked
    if smoothing:
        loss = loss - smoothing * mean
    return loss + z_loss * square if z_loss else loss, square


def _tiles(start: int, end: int, first: int, last: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    for place in range(start, end, rows):
        yield place, min(place + rows, end), first, last


def _sizes(hidden: Tensor) -> dict[str, Any]:
    """Small tiles for float32, which has no tensor cores at full precision, and under the interpreter."""
    small = hidden.dtype == torch.float32
    rows, ids, step = (64, 64, 32) if small else (ROWS, IDS, STEP)
    upcast = interpreted() and hidden.dtype == torch.bfloat16
    return {
        "ROWS": rows, "IDS": ids, "STEP": step, "UPCAST": upcast, "num_warps": 4 if small else WARPS,
        "num_stages": 2 if small else STAGES,
    }  # fmt: skip


Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("weft::sliced_logits", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, target: Tensor, slice_index: Tensor, borders: list[int]) -> Sums:
    """log Z, the target's logit and the mean logit [N]; the order of tokens by slice [N]; tokens per slice, on the CPU."""
    from weft.kernels.triton_loss_programs import loss_forward

    hidden, weight, sizes = hidden.contiguous(), weight.contiguous(), _sizes(hidden)
    order = torch.argsort(slice_index, stable=True)
    counts = torch.bincount(slice_index, minlength=len(borders) // 2).to("cpu", copy=True)
    log_z, picked, mean = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    tiles: list[tuple[int, int, int, int]] = []
    start = 0
    for number, count in enumerate(counts.tolist()):
        tiles += _tiles(start, start + count, borders[2 * number], borders[2 * number + 1], sizes["ROWS"])
        start += count
    if tiles:
        tiles.sort(key=lambda tile: tile[2] - tile[3])  # the longest slices first
        table = torch.tensor(tiles, dtype=torch.int32).to(hidden.device, non_blocking=True)
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            loss_forward[(len(tiles),)](hidden, weight, target, order, table, log_z, picked, mean, hidden.shape[1], **sizes)
    return log_z, picked, mean, order, counts


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, slice_index: Tensor, borders: list[int]) -> Sums:
    log_z, picked, mean = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    counts = torch.empty(len(borders) // 2, dtype=torch.int64, device="cpu")
    return log_z, picked, mean, torch.empty_like(slice_index, dtype=torch.int64), counts


@torch.library.custom_op("weft::sliced_logits_backward", mutates_args=())
def _backward(
    hidden: Tensor, weight: Tensor, target: Tensor, order: Tensor, log_z: Tensor, grads: list[Tensor], counts: Tensor,
    borders: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from weft.kernels.triton_loss_programs import loss_signal

    hidden, weight, sizes = hidden.contiguous(), weight.contiguous(), _sizes(hidden)
    grads = [grad.contiguous() for grad in grads]
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    start = 0
    for number, count in enumerate(counts.tolist()):
        first, last = borders[2 * number], borders[2 * number + 1]
        rows = max(sizes["ROWS"], BLOCK_BYTES // ((last - first) * hidden.element_size()) // sizes["ROWS"] * sizes["ROWS"])
        for begin in range(start, start + count, rows):
            end = min(begin + rows, start + count)
            tiles = list(_tiles(begin, end, first, last, sizes["ROWS"]))
            table = torch.tensor(tiles, dtype=torch.int32).to(hidden.device, non_blocking=True)
            signal = hidden.new_empty((end - begin, last - first))
            grid = (len(tiles), -(-(last - first) // sizes["IDS"]))
            with torch.cuda.device_of(hidden):
                loss_signal[grid](
                    hidden, weight, target, order, table, log_z, *grads, signal, begin, last - first, hidden.shape[1], **sizes
                )
            tokens = order[begin:end]
            grad_hidden.index_copy_(0, tokens, signal @ weight[first:last].to(hidden.dtype))
            grad_weight[first:last] += signal.T @ hidden[tokens]
        start += count
    return grad_hidden, grad_weight.to(weight.dtype)


@_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, target: Tensor, order: Tensor, log_z: Tensor, grads: list[Tensor], counts: Tensor,
    borders: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sums) -> None:
    hidden, weight, target, _, ctx.borders = inputs
    ctx.save_for_backward(hidden, weight, target, output[0], *output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    hidden, weight, target, log_z, order, counts = ctx.saved_tensors
    grad_hidden, grad_weight = _backward(hidden, weight, target, order, log_z, list(grads[:3]), counts, ctx.borders)
    return grad_hidden, grad_weight, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
