# mypy: ignore-errors
# Inside `triton.jit` a name is a compile-time or GPU value: Python's types do not apply.
"""Interval attention, backward, in Triton: delta, then query gradients per query tile, then key gradients per key tile.

In: what the forward pass read and wrote, and the gradient of its output [T H K]. Out: gradients of q [T H K], k and v [T G K].
Weights are computed again from the log-sum-exp (FlashAttention-2, Dao 2023, algorithm 2), without atomics: the query kernel
walks key ranges as the forward pass does, the key kernel the queries that see a tile of keys. It runs twice, over all keys
for the queries that have them in their main range, then over gathered landmarks for later queries, adding to the first.
"""

import triton
import triton.language as tl

from weft.kernels.triton_forward import FULL, LANDMARKS, LOG2_E, NEVER, PARTIAL, key_places, product, rows, visible


@triton.jit
def delta(out, grad, result, total, heads, WIDTH: tl.constexpr, QUERIES: tl.constexpr):
    """result [H T] = sum over channels of out * grad, both contiguous [T H K]. Grid: tiles of tokens, heads."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    exists = query < total
    start = head.to(tl.int64) * WIDTH
    a = rows(out + start, query, heads * WIDTH, exists, WIDTH, True).to(tl.float32)
    b = rows(grad + start, query, heads * WIDTH, exists, WIDTH, True).to(tl.float32)
    tl.store(result + head.to(tl.int64) * total + query, tl.sum(a * b, 1), mask=exists)


@triton.jit
def _walk_keys(
    total_grad, q, grad, lse, share, k, v, born, dies, at, query, begin, end, before, total, stride_k, stride_v, factor,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, KEYS):
        key, inside = key_places(at, first, end, before, total, KEYS, FORM)
        key_rows = rows(k, key, stride_k, inside, WIDTH, FORM != FULL)
        value_rows = rows(v, key, stride_v, inside, WIDTH, FORM != FULL)
        weight = tl.exp2(product(q, tl.trans(key_rows), UPCAST) * factor - lse[:, None])
        if FORM != FULL:
            weight = tl.where(visible(born, dies, key, inside, query), weight, 0.0)
        signal = weight * (product(grad, tl.trans(value_rows), UPCAST) - share[:, None])
        total_grad += product(signal.to(key_rows.dtype), key_rows, UPCAST)
    return total_grad


@triton.jit
def query_grad(
    q, k, v, grad, lse, share, result, born, dies, at, table, scale, total, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles * H programs. `grad` and `result` are contiguous [T H K], `lse` and `share` (delta) [H T]."""
    program = tl.program_id(0)
    head = program % heads
    row = table + (program // heads) * 7
    query = tl.load(row) * QUERIES + tl.arange(0, QUERIES)
    begin, full_begin, full_end, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    exists = query < total
    start = head.to(tl.int64) * WIDTH
    q_rows = rows(q + head.to(tl.int64) * stride_qh, query, stride_qt, exists, WIDTH, True)
    grad_rows = rows(grad + start, query, heads * WIDTH, exists, WIDTH, True)
    place = head.to(tl.int64) * total + query
    peak = tl.load(lse + place, mask=exists, other=float("inf")) * LOG2_E  # a query that does not exist weighs nothing
    part = tl.load(share + place, mask=exists, other=0.0)
    k += (head // group).to(tl.int64) * stride_kh
    v += (head // group).to(tl.int64) * stride_vh
    factor = scale * LOG2_E
    g = tl.zeros([QUERIES, WIDTH], tl.float32)
    g = _walk_keys(
        g, q_rows, grad_rows, peak, part, k, v, born, dies, at, query, tl.load(row + 5), tl.load(row + 6), begin, total,
        stride_kt, stride_vt, factor, WIDTH, KEYS, LANDMARKS, UPCAST,
    )  # fmt: skip
    g = _walk_keys(
        g, q_rows, grad_rows, peak, part, k, v, born, dies, at, query, begin, full_begin, 0, total,
        stride_kt, stride_vt, factor, WIDTH, KEYS, PARTIAL, UPCAST,
    )  # fmt: skip
    g = _walk_keys(
        g, q_rows, grad_rows, peak, part, k, v, born, dies, at, query, full_begin, full_end, 0, total,
        stride_kt, stride_vt, factor, WIDTH, KEYS, FULL, UPCAST,
    )  # fmt: skip
    g = _walk_keys(
        g, q_rows, grad_rows, peak, part, k, v, born, dies, at, query, full_end, end, 0, total,
        stride_kt, stride_vt, factor, WIDTH, KEYS, PARTIAL, UPCAST,
    )  # fmt: skip
    out = result + start + query.to(tl.int64)[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(out, (g * scale).to(result.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _walk_queries(
    key_total, value_total, k, v, first_query, last_query, q, grad, lse, share, begin, end, total, stride_q, stride_grad,
    factor, WIDTH: tl.constexpr, QUERIES: tl.constexpr, FORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, QUERIES):
        query = first + tl.arange(0, QUERIES)
        exists = query < total
        q_rows = rows(q, query, stride_q, exists, WIDTH, FORM != FULL)
        grad_rows = rows(grad, query, stride_grad, exists, WIDTH, FORM != FULL)
        if FORM == FULL:
            peak = tl.load(lse + query)
            part = tl.load(share + query)
        else:
            peak = tl.load(lse + query, mask=exists, other=float("inf"))
            part = tl.load(share + query, mask=exists, other=0.0)
        weight = tl.exp2(product(k, tl.trans(q_rows), UPCAST) * factor - (peak * LOG2_E)[None, :])
        if FORM != FULL:
            seen = (first_query[:, None] <= query[None, :]) & (query[None, :] < last_query[:, None])
            weight = tl.where(seen, weight, 0.0)
        value_total += product(weight.to(grad_rows.dtype), grad_rows, UPCAST)
        signal = weight * (product(v, tl.trans(grad_rows), UPCAST) - part[None, :])
        key_total += product(signal.to(q_rows.dtype), q_rows, UPCAST)
    return key_total, value_total


@triton.jit
def key_grad(
    q, k, v, grad, lse, share, k_result, v_result, first_query, last_query, at, table, scale, total, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GATHER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles * G programs. Key j is walked over queries [first_query[j], last_query[j]) of every head of its group.

    With GATHER a tile holds landmarks and its gradients are added to the results [T G K], else they are written.
    """
    kv_heads = heads // group
    program = tl.program_id(0)
    kv_head = program % kv_heads
    row = table + (program // kv_heads) * 5
    begin, full_begin, full_end, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    if not GATHER or begin < end:
        key = tl.load(row) * KEYS + tl.arange(0, KEYS)
        inside = key < total
        if GATHER:
            key = tl.load(at + key, mask=inside, other=NEVER)
            inside = key < total
        first = tl.load(first_query + key, mask=inside, other=NEVER)
        last = tl.load(last_query + key, mask=inside, other=0)
        k_rows = rows(k + kv_head.to(tl.int64) * stride_kh, key, stride_kt, inside, WIDTH, True)
        v_rows = rows(v + kv_head.to(tl.int64) * stride_vh, key, stride_vt, inside, WIDTH, True)
        factor = scale * LOG2_E
        a = tl.zeros([KEYS, WIDTH], tl.float32)
        b = tl.zeros([KEYS, WIDTH], tl.float32)
        for member in range(0, group):
            head = (kv_head * group + member).to(tl.int64)
            q_head, grad_head = q + head * stride_qh, grad + head * WIDTH
            lse_head, share_head = lse + head * total, share + head * total
            a, b = _walk_queries(
                a, b, k_rows, v_rows, first, last, q_head, grad_head, lse_head, share_head, begin, full_begin, total,
                stride_qt, heads * WIDTH, factor, WIDTH, QUERIES, PARTIAL, UPCAST,
            )  # fmt: skip
            a, b = _walk_queries(
                a, b, k_rows, v_rows, first, last, q_head, grad_head, lse_head, share_head, full_begin, full_end, total,
                stride_qt, heads * WIDTH, factor, WIDTH, QUERIES, FULL, UPCAST,
            )  # fmt: skip
            a, b = _walk_queries(
                a, b, k_rows, v_rows, first, last, q_head, grad_head, lse_head, share_head, full_end, end, total,
                stride_qt, heads * WIDTH, factor, WIDTH, QUERIES, PARTIAL, UPCAST,
            )  # fmt: skip
        place = key.to(tl.int64)[:, None] * (kv_heads * WIDTH) + kv_head * WIDTH + tl.arange(0, WIDTH)[None, :]
        a *= scale
        if GATHER:
            a += tl.load(k_result + place, mask=inside[:, None], other=0.0).to(tl.float32)
            b += tl.load(v_result + place, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(k_result + place, a.to(k_result.dtype.element_ty), mask=inside[:, None])
        tl.store(v_result + place, b.to(v_result.dtype.element_ty), mask=inside[:, None])
