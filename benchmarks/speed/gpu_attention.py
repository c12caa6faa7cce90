"""The attention lines of the GPU table: kinds of stream x length x window x head width x direction, 16 query and 4 kv heads.

Ours: every backend of `weft.kernels.attention` that this project wrote. Rivals, each in its best form for the interval mask:
FlexAttention (interval test as its mask, block lists from the intervals, the fastest of its variants), FlashAttention-4 (the
same test and lists), variable-length attention and xformers where their masks can say what the layout says, torch's attention
with the dense mask. cuDNN's dense causal attention does other, larger work; it is there to divide by. `useful` counts visible
pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.benchmarks.speed.gpu_table import Bench, Call, Goal, Line, NotMeasured, line
from weft.benchmarks.speed.report import relative_error
from weft.kernels.attention import BACKENDS, attention, why
from weft.kernels.layout import StreamLayout

STREAMS = ("text", "image+text", "video", "documents")
LIBRARIES = ("flex", "xformers", "sdpa", "reference")  # of BACKENDS, not written here
DENSE = ("cudnn dense causal", "sdpa dense causal")
LONGEST_DENSE_MASK = 8192
FLEX = ("default", "tma", "max-autotune")
GOALS = {False: (Goal("flex", 1.1, 1.5), Goal("fa4", 0.5, 0.9)), True: (Goal("flex", 1.0, 1.3), Goal("fa4", 0.5, 0.8))}


@dataclass(frozen=True)
class Case:
    """One row of the attention table."""

    stream: str
    length: int
    window: int | None
    width: int
    backward: bool
    heads: int = 16
    kv_heads: int = 4

    @property
    def name(self) -> str:
        way = "forward + backward" if self.backward else "forward"
        return f"{self.stream} L={self.length} W={self.window or 'full'} K={self.width} {way}"


def cases(quick: bool) -> Iterator[Case]:
    """Every row, or one length, window and head width per kind of stream."""
    lengths, windows, widths = ((8192,), (1024,), (128,)) if quick else ((8192, 32768), (512, 1024, None), (64, 128))
    for stream in STREAMS:
        for length in lengths:
            for window in windows:
                for width in widths:
                    yield from (Case(stream, length, window, width, backward) for backward in (False, True))


def smoke_cases() -> Iterator[Case]:
    """One tiny row per kind of stream and direction."""
    for stream in STREAMS:
        yield from (Case(stream, 300, 24, 16, backward, 4, 2) for backward in (False, True))


def stream_layout(kind: str, length: int, window: int | None, device: str, seed: int = 0) -> StreamLayout:
    """text: documents of about 800 tokens. image+text: images of 256, 576 or 1024 two-way tokens between texts of 64 to 512.
    video: frames of 256 two-way tokens and a closing token. documents: about 4000 tokens, causal, no landmarks. Sizes shrink
    with lengths below 8192."""
    random, scale = torch.Generator().manual_seed(seed), max(1, 8192 // length)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low // scale, max(high // scale, low // scale + 1), (), generator=random))

    document, landmark = torch.zeros(length, dtype=torch.int32), torch.zeros(length, dtype=torch.bool)
    block = torch.full((length,), -1, dtype=torch.int32)
    at, number, media = 0, 0, 0
    while at < length:
        body = {"text": lambda: draw(100, 1500), "documents": lambda: draw(2000, 6000)}.get(kind, lambda: draw(6000, 12000))()
        end = min(at + max(body, 1), length)
        document[at:end] = number
        landmark[at] = kind != "documents"
        while at < end and kind in ("image+text", "video"):
            first = at + (draw(64, 512) if kind == "image+text" else 0)
            image = max(
                1, ((256, 576, 1024)[int(torch.randint(3, (), generator=random))] if kind == "image+text" else 256) // scale
            )
            if first + image + 1 > end:
                break
            media += 1
            block[first : first + image] = media
            landmark[first + image] = True
            at = first + image + 1
        at, number = end, number + 1
    return StreamLayout.build(document, landmark, block, window).to(device)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: StreamLayout, queries: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, by the definition: the attention of some queries [n H K] and the gradient of those queries."""
    group = q.shape[1] // k.shape[1]
    seen = (layout.born <= queries[:, None]) & (queries[:, None] < layout.dies)
    rows, signal = (x[queries].double().unflatten(1, (k.shape[1], group)) for x in (q, grad))
    scale = q.shape[-1] ** -0.5
    score = torch.einsum("ngrk,tgk->ngrt", rows, k.double()) * scale
    weight = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    to_weight = torch.einsum("ngrk,tgk->ngrt", signal, v.double())
    to_score = weight * (to_weight - (weight * to_weight).sum(-1, keepdim=True))
    out = torch.einsum("ngrt,tgk->ngrk", weight, v.double())
    return out.flatten(1, 2), torch.einsum("ngrt,tgk->ngrk", to_score, k.double()).flatten(1, 2) * scale


def attention_line(bench: Bench, case: Case, flex: tuple[str, ...] = FLEX) -> Line:
    """Time every contender on one case."""
    layout = stream_layout(case.stream, case.length, case.window, bench.device)
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    sizes = (case.heads, case.kv_heads, case.kv_heads)
    q, k, v = (torch.randn(case.length, n, case.width, device=bench.device, dtype=dtype) for n in sizes)
    grad = torch.randn_like(q)
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]
    queries = torch.randperm(case.length, device=bench.device)[:64]
    truth = exact_rows(q.detach(), k.detach(), v.detach(), grad, layout, queries)

    def whole(function: Callable[[], Tensor]) -> Call:
        def run() -> list[Tensor]:
            out = function()
            return [out.detach(), *(torch.autograd.grad(out, inputs, grad) if case.backward else ())]

        return run

    def check(results: list[Tensor]) -> dict[str, float]:
        names = ("out", "dq") if case.backward else ("out",)
        return {name: relative_error(got[queries], exact) for name, got, exact in zip(names, results, truth)}

    made: dict[str, Callable[[], Call]] = {}
    mine = ours() if bench.device == "cuda" else (*ours(), "sdpa")  # the CPU's own path
    for name in [*mine, "xformers", *(("reference",) if bench.device == "cpu" else ())]:
        made[name] = lambda name=name: whole(_ours(name, q, k, v, layout))  # type: ignore[misc]
    made["flex"] = lambda: whole(_flex(q, k, v, layout, flex))
    made["fa4"] = lambda: whole(_fa4(q, k, v, layout))
    made["varlen"] = lambda: whole(_varlen(q, k, v, layout))
    made["sdpa dense mask"] = lambda: whole(_dense_mask(q, k, v, layout))
    made[DENSE[0]] = lambda: whole(_dense_causal(q, k, v, True))
    made[DENSE[1]] = lambda: whole(_dense_causal(q, k, v, False))
    flops = layout.flops(case.heads, case.width) * (3.5 if case.backward else 1)
    extra: dict[str, float | str | None] = {"visible_share_of_causal": 2 * layout.pairs / case.length**2}
    goals = GOALS[case.backward]
    return line(
        bench, "attention", case.name, made, flops=flops, check=check, unchecked=DENSE, ours=mine, goals=goals, extra=extra
    )


def ours() -> tuple[str, ...]:
    """Attention backends of our own."""
    return tuple(name for name in BACKENDS if name not in LIBRARIES)


def _ours(name: str, q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> Callable[[], Tensor]:
    reason = dict(why(q, k, v, layout))[name]
    if reason != "runs":
        raise NotMeasured(reason)
    return lambda: attention(q, k, v, layout, backend=name)


def _needs_gpu(q: Tensor, what: str) -> None:
    if q.device.type != "cuda":
        raise NotMeasured(f"{what} needs an NVIDIA GPU")


@functools.cache
def _compiled(variant: str, length: int, width: int) -> Any:
    """One program per shape and variant."""
    from torch.nn.attention.flex_attention import flex_attention

    tuned = "max-autotune-no-cudagraphs" if variant == "max-autotune" else None
    return torch.compile(flex_attention, dynamic=False, mode=tuned)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, variants: tuple[str, ...]) -> Callable[[], Tensor]:
    """The fastest variant of FlexAttention, by a few rounds."""
    _needs_gpu(q, "FlexAttention in its best form")
    mask = layout.to_block_mask()
    turned = [x.transpose(0, 1)[None] for x in (q, k, v)]
    best: tuple[float, Callable[[], Tensor]] | None = None
    for variant in variants:

        def call(variant: str = variant) -> Tensor:
            options = {"kernel_options": {"USE_TMA": True}} if variant == "tma" else {}
            program = _compiled(variant, len(q), q.shape[-1])
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=256):
                return program(*turned, block_mask=mask, enable_gqa=True, **options)[0].transpose(0, 1)

        try:
            seconds = _quick(call, [q, k, v])
        except Exception:
            if variant == "default":
                raise
            continue  # a variant that this GPU or shape does not take
        if best is None or seconds < best[0]:
            best = (seconds, call)
    assert best is not None
    return best[1]


def _quick(call: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """Seconds of the fastest of five rounds."""
    times = []
    for _ in range(6):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        out = call()
        if out.requires_grad:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return min(times[1:]) / 1e3


def _fa4(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> Callable[[], Tensor]:
    from weft.benchmarks.speed.gpu_fa4 import call, missing

    reason = missing()
    if reason:
        raise NotMeasured(reason)
    _needs_gpu(q, "FlashAttention-4")
    return call(q, k, v, layout)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> Callable[[], Tensor]:
    """torch's attention over sequences of different lengths; it knows documents, causality and a window."""
    at = torch.arange(len(layout), device=layout.device)
    window = layout.window
    dies = layout.document_end if window is None else torch.minimum(at + window, layout.document_end)
    if not bool((layout.born == at).all()) or not bool((layout.dies == dies).all()):
        raise NotMeasured("its mask cannot say two-way blocks or landmarks")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise NotMeasured("not installed: this torch has no varlen_attn") from None
    _needs_gpu(q, "varlen_attn")
    borders = layout.cu_seqlens()
    longest = int(borders.diff().max())
    left = -1 if window is None else window - 1
    group = q.shape[1] // k.shape[1]

    def run() -> Tensor:
        out = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(left, 0), enable_gqa=group > 1)
        return out if isinstance(out, Tensor) else out[0]

    return run


def _dense_mask(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> Callable[[], Tensor]:
    if len(layout) > LONGEST_DENSE_MASK:
        raise NotMeasured(f"a mask of {len(layout)} x {len(layout)} is only timed up to {LONGEST_DENSE_MASK}")
    mask = layout.dense_mask()
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    return lambda: F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)[0].transpose(0, 1)


def _dense_causal(q: Tensor, k: Tensor, v: Tensor, cudnn: bool) -> Callable[[], Tensor]:
    """Plain causal attention over the whole length: cuDNN's, or torch's choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if cudnn:
        _needs_gpu(q, "cuDNN")
    group = q.shape[1] // k.shape[1]
    chosen = [SDPBackend.CUDNN_ATTENTION] if cudnn else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def run(grouped: bool) -> Tensor:
        keys, values = (k, v) if grouped else (x.repeat_interleave(group, 1) for x in (k, v))
        a, b, c = (x.transpose(0, 1)[None] for x in (q, keys, values))
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped)[0].transpose(0, 1)

    try:
        run(True)
    except RuntimeError:  # kernels without grouped heads
        return lambda: run(False)
    return lambda: run(True)
