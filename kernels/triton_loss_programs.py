# mypy: ignore-errors
# Inside `triton.jit` a name is a compile-time or GPU value: Python's types do not apply.
"""Sliced linear cross-entropy in Triton: logits live in registers, one tile at a time.

In: hidden [N D], weight [V D], targets, tokens sorted by slice, and a table of tiles (first place in the order, end, first id,
end id). Out, forward: log Z, the target's logit and the mean logit per token. Backward: the gradient of one bounded block of
logits, computed again; two library products make the gradients of hidden and weight from it.
"""

import triton
import triton.language as tl

from weft.kernels.triton_forward import product


@triton.jit
def _logits(
    hidden, weight, token, inside, ident, legal, width,
    ROWS: tl.constexpr, IDS: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[ROWS IDS] in float32: hidden[token] . weight[ident]."""
    total = tl.zeros([ROWS, IDS], tl.float32)
    for first in range(0, width, STEP):
        channel = first + tl.arange(0, STEP)
        held = channel < width
        at = hidden + token[:, None] * width + channel[None, :]
        a = tl.load(at, mask=inside[:, None] & held[None, :], other=0.0)
        at = weight + ident[:, None] * width + channel[None, :]
        b = tl.load(at, mask=legal[:, None] & held[None, :], other=0.0)
        total += product(a, tl.trans(b.to(a.dtype)), UPCAST)
    return total


@triton.jit
def loss_forward(
    hidden, weight, target, order, table, log_z, picked, mean, width,
    ROWS: tl.constexpr, IDS: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens of one slice, walking over the slice's ids with a running log-sum-exp."""
    row = table + tl.program_id(0) * 4
    first, last, first_id, end_id = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    place = first + tl.arange(0, ROWS)
    inside = place < last
    token = tl.load(order + place, mask=inside, other=0)
    wanted = tl.load(target + token, mask=inside, other=-1)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)
    sum_of_logits = tl.zeros([ROWS], tl.float32)
    for start in range(first_id, end_id, IDS):
        ident = (start + tl.arange(0, IDS)).to(tl.int64)
        legal = ident < end_id
        logits = _logits(hidden, weight, token, inside, ident, legal, width, ROWS, IDS, STEP, UPCAST)
        chosen += tl.sum(tl.where(ident[None, :] == wanted[:, None], logits, 0.0), 1)
        sum_of_logits += tl.sum(logits, 1)  # rows of illegal ids were read as zeros
        logits = tl.where(legal[None, :], logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1))
        mass = mass * tl.exp(peak - highest) + tl.sum(tl.exp(logits - highest[:, None]), 1)
        peak = highest
    mass = tl.where(inside, mass, 1.0)
    tl.store(log_z + token, tl.where(inside, peak, 0.0) + tl.log(mass), mask=inside)
    tl.store(picked + token, chosen, mask=inside)
    tl.store(mean + token, sum_of_logits / (end_id - first_id), mask=inside)


@triton.jit
def loss_signal(
    hidden, weight, target, order, table, log_z, grad_log_z, grad_picked, grad_mean, signal, begin, columns, width,
    ROWS: tl.constexpr, IDS: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of logits, in the dtype of `signal` [tokens of the block, columns].

    Grid: token tiles, id tiles.     d logit = softmax * grad_log_z + one_hot * grad_picked + grad_mean / ids.
    """
    row = table + tl.program_id(0) * 4
    first, last, first_id, end_id = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    place = first + tl.arange(0, ROWS)
    inside = place < last
    token = tl.load(order + place, mask=inside, other=0)
    column = tl.program_id(1) * IDS + tl.arange(0, IDS)
    ident = (first_id + column).to(tl.int64)
    legal = ident < end_id
    logits = _logits(hidden, weight, token, inside, ident, legal, width, ROWS, IDS, STEP, UPCAST)
    z = tl.load(log_z + token, mask=inside, other=float("inf"))  # a token that does not exist has probability zero
    to_z = tl.load(grad_log_z + token, mask=inside, other=0.0)
    to_picked = tl.load(grad_picked + token, mask=inside, other=0.0)
    to_mean = tl.load(grad_mean + token, mask=inside, other=0.0) / (end_id - first_id)
    wanted = tl.load(target + token, mask=inside, other=-1)
    result = tl.exp(logits - z[:, None]) * to_z[:, None] + to_mean[:, None]
    result += tl.where(ident[None, :] == wanted[:, None], to_picked[:, None], 0.0)
    at = signal + (place - begin).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, result.to(signal.dtype.element_ty), mask=inside[:, None] & (column < columns)[None, :])
