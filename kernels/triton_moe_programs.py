# mypy: ignore-errors
# Inside `triton.jit` a name is a compile-time or GPU value: Python's types do not apply.
"""Everything of a routed layer that is not a matrix product, in Triton: sort, spread, SwiGLU, gather-sum.

A choice is one (token, expert) pair, number t * S + s; a row is a choice's place after sorting by expert. All sums run in
float32 and in one order, without atomics.

Axes: `T tokens  D width  E experts  S experts per token  F expert width  N = T * S choices`.
"""

import triton
import triton.language as tl


@triton.jit
def count(expert, table, total, blocks, experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """table [E blocks]: how many of each block of BLOCK choices went to each expert. Grid: blocks, tiles of experts."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + choice, mask=choice < total, other=-1).to(tl.int32)
    number = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    found = tl.sum((chosen[:, None] == number[None, :]).to(tl.int32), 0)
    tl.store(table + number.to(tl.int64) * blocks + block, found, mask=number < experts)


@triton.jit
def arrange(expert, first, order, place, total, blocks, BLOCK: tl.constexpr):
    """place [N] of each choice among the rows and order [N], the choice of each row; a stable sort by expert.

    first [E blocks]: the row of the first choice of each block for each expert. Grid: blocks.
    """
    block = tl.program_id(0)
    inner = tl.arange(0, BLOCK)
    choice = block * BLOCK + inner
    inside = choice < total
    chosen = tl.load(expert + choice, mask=inside, other=-1).to(tl.int32)
    earlier = (chosen[None, :] == chosen[:, None]) & (inner[None, :] < inner[:, None])
    row = tl.load(first + chosen.to(tl.int64) * blocks + block, mask=inside, other=0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(place + choice, row, mask=inside)
    tl.store(order + row, choice, mask=inside)


@triton.jit
def spread(x, place, out, columns, CHOICES: tl.constexpr, COLUMNS: tl.constexpr):
    """out[place[t, s]] = x[t] for every s: x [T D] is read once and written S times. Grid: T, tiles of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = column < columns
    row = tl.load(x + token * columns + column, mask=held)
    for choice in tl.static_range(CHOICES):
        at = tl.load(place + token * CHOICES + choice).to(tl.int64)
        tl.store(out + at * columns + column, row, mask=held)


@triton.jit
def gather_sum(rows, place, out, columns, CHOICES: tl.constexpr, COLUMNS: tl.constexpr):
    """out[t] = sum over s of rows[place[t, s]], in the order of s. Grid: T, tiles of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in tl.static_range(CHOICES):
        at = tl.load(place + token * CHOICES + choice).to(tl.int64)
        total += tl.load(rows + at * columns + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=held)


@triton.jit
def _halves(gate_up, row, column, inside, columns):
    """gate and up [ROWS COLUMNS] in float32 of gate_up [N 2F]."""
    at = gate_up + row.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def swiglu_forward(gate_up, weight, order, out, total, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [N F] = weight[order[n]] * silu(gate) * up. Grid: tiles of rows, tiles of columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < total
    inside = exists[:, None] & (column < columns)[None, :]
    gate, up = _halves(gate_up, row, column, inside, columns)
    share = tl.load(weight + tl.load(order + row, mask=exists, other=0), mask=exists, other=0.0)
    result = gate * tl.sigmoid(gate) * up * share[:, None]
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    gate_up, grad, weight, order, grad_gate_up, again, grad_weight, total, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """From the gradient [N F] of the forward's result: that of gate_up [N 2F] and of weight [N choices], and the result again.

    Grid: tiles of rows; each program walks over the columns, so that a weight's gradient is one sum in one order.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < total
    choice = tl.load(order + row, mask=exists, other=0)
    share = tl.load(weight + choice, mask=exists, other=0.0)[:, None]
    to_weight = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (column < columns)[None, :]
        gate, up = _halves(gate_up, row, column, inside, columns)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        signal = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        open = tl.sigmoid(gate)
        silu = gate * open
        to_weight += tl.sum(signal * silu * up, 1)
        tl.store(again + at, (silu * up * share).to(again.dtype.element_ty), mask=inside)
        signal *= share
        at = grad_gate_up + row.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
        to_gate = signal * up * (open + silu * (1 - open))
        tl.store(at, to_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(at + columns, (signal * silu).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_weight + choice, to_weight, mask=exists)
