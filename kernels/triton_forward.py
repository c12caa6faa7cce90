# mypy: ignore-errors
# Inside `triton.jit` a name is a compile-time or GPU value: Python's types do not apply.
"""Interval attention, forward, in Triton: one program per query tile and head, online softmax over the tile's key ranges.

In: q [T H K], k and v [T G K], the spans and the query table of an `IntervalPlan`. Out: out [T H K], natural log-sum-exp [H T].
The recurrence is that of FlashAttention-2 (Dao 2023, algorithm 1); the ranges are ours. `UPCAST` multiplies in float32: the
interpreter of Triton would multiply bfloat16 bit patterns as integers.
"""

import triton
import triton.language as tl

FULL, PARTIAL, LANDMARKS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a @ b, summed in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rows(base, place, stride, inside, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows `place` of a [n WIDTH] matrix; zero where not `inside`."""
    pointer = base + place.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(pointer, mask=inside[:, None], other=0.0)
    return tl.load(pointer)


@triton.jit
def key_places(at, first, end, before, total, KEYS: tl.constexpr, FORM: tl.constexpr):
    """Positions of one tile's keys and which of them exist. Landmarks from `before` on belong to the main range."""
    place = first + tl.arange(0, KEYS)
    if FORM == LANDMARKS:
        listed = place < end
        place = tl.load(at + place, mask=listed, other=0)
        return place, listed & (place < before)
    return place, place < total


@triton.jit
def visible(born, dies, key, inside, query):
    """bool [queries keys]: the element test."""
    first = tl.load(born + key, mask=inside, other=NEVER)
    last = tl.load(dies + key, mask=inside, other=0)
    return (first[None, :] <= query[:, None]) & (query[:, None] < last[None, :])


@triton.jit
def _walk(
    state_out, state_sum, state_peak, q, k, v, born, dies, at, query, begin, end, before, total, stride_k, stride_v, factor,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, KEYS):
        key, inside = key_places(at, first, end, before, total, KEYS, FORM)
        key_rows = rows(k, key, stride_k, inside, WIDTH, FORM != FULL)
        score = product(q, tl.trans(key_rows), UPCAST)
        if FORM != FULL:
            score = tl.where(visible(born, dies, key, inside, query), score, float("-inf"))
        peak = tl.maximum(state_peak, tl.max(score, 1) * factor)
        shift = peak
        if FORM != FULL:
            shift = tl.where(peak == float("-inf"), 0.0, peak)  # a row that saw no key yet
        weight = tl.exp2(score * factor - shift[:, None])
        decay = tl.exp2(state_peak - shift)
        value_rows = rows(v, key, stride_v, inside, WIDTH, FORM != FULL)
        state_sum = state_sum * decay + tl.sum(weight, 1)
        state_out = state_out * decay[:, None] + product(weight.to(value_rows.dtype), value_rows, UPCAST)
        state_peak = peak
    return state_out, state_sum, state_peak


@triton.jit
def forward(
    q, k, v, out, lse, born, dies, at, table, scale, total, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles * H programs, heads side by side, so that the heads of a group read the same keys at about the same time."""
    program = tl.program_id(0)
    head = program % heads
    row = table + (program // heads) * 7
    query = tl.load(row) * QUERIES + tl.arange(0, QUERIES)
    begin, full_begin, full_end, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    exists = query < total
    q_rows = rows(q + head.to(tl.int64) * stride_qh, query, stride_qt, exists, WIDTH, True)
    k += (head // group).to(tl.int64) * stride_kh
    v += (head // group).to(tl.int64) * stride_vh
    factor = scale * LOG2_E
    o = tl.zeros([QUERIES, WIDTH], tl.float32)
    s = tl.zeros([QUERIES], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    o, s, m = _walk(
        o, s, m, q_rows, k, v, born, dies, at, query, tl.load(row + 5), tl.load(row + 6), begin, total, stride_kt, stride_vt,
        factor, WIDTH, KEYS, LANDMARKS, UPCAST,
    )  # fmt: skip
    o, s, m = _walk(
        o, s, m, q_rows, k, v, born, dies, at, query, begin, full_begin, 0, total, stride_kt, stride_vt, factor,
        WIDTH, KEYS, PARTIAL, UPCAST,
    )  # fmt: skip
    o, s, m = _walk(
        o, s, m, q_rows, k, v, born, dies, at, query, full_begin, full_end, 0, total, stride_kt, stride_vt, factor,
        WIDTH, KEYS, FULL, UPCAST,
    )  # fmt: skip
    o, s, m = _walk(
        o, s, m, q_rows, k, v, born, dies, at, query, full_end, end, 0, total, stride_kt, stride_vt, factor,
        WIDTH, KEYS, PARTIAL, UPCAST,
    )  # fmt: skip
    s = tl.where(exists, s, 1.0)
    place = query.to(tl.int64)[:, None] * (heads * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + place, (o / s[:, None]).to(out.dtype.element_ty), mask=exists[:, None])
    m = tl.where(exists, m, 0.0)
    tl.store(lse + head.to(tl.int64) * total + query, (m + tl.log2(s)) / LOG2_E, mask=exists)
