"""One decode step of one local layer: our kernel over its paged cache against FlexAttention's decode kernel and torch's own.

Ours takes q, k, v as they leave the projection and does QK-norm, rotation, the write into the cache and attention. The rivals
get the same work: plain torch for norm, rotation and write, then attention over a contiguous, full cache, their best form. A
step over the caches of many layers, more than an L2 cache holds, is replayed from one CUDA graph; figures are per layer. `rows`
serves gpu.py; on a CPU (smoke) the plain torch step stands for ours, and no figure means anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.benchmarks.speed.report import Row, compare, measure, relative_error
from weft.kernels.cuda_decode import Step, decode_attention, new_step, supports
from weft.kernels.paged import PagedCache
from weft.kernels.rotary import qk_norm_rope, rope_table

HEADS, KV_HEADS, WINDOW, LANDMARKS = 16, 4, 1024, 64
COLD_BYTES = 160 << 20  # of all layers together
MUST, AIM = 1.3, 2.0  # against FlexAttention's decode
GOALS = {1: "must 12 us, aim 7 us", 256: "must 2.6 TB/s, aim 3.2 TB/s"}


class Problem:
    """Random caches of `layers` layers with every slot alive, and one step over them."""

    def __init__(self, batch: int, width: int, device: str, window: int, landmarks: int) -> None:
        dtype = torch.bfloat16
        self.keys_alive, self.width = window + landmarks, width
        self.layer_bytes = batch * self.keys_alive * 2 * KV_HEADS * width * dtype.itemsize
        self.layers = 2 if device == "cpu" else max(2, -(-COLD_BYTES // self.layer_bytes))
        length = 2 * window + landmarks
        self.cache = PagedCache(
            batch, self.layers, 0, KV_HEADS, width, window=window, max_landmarks=landmarks, max_length=length + 1,
            page=min(64, window), device=device, dtype=dtype,
        )  # fmt: skip
        for row in range(batch):  # landmarks only among tokens that have left: a step without `advance` can be repeated
            self.cache.begin(row, [at < landmarks for at in range(length)])
            self.cache.reserve(row, length + 1)
        self.cache.local.pool.normal_()
        self.step: Step = new_step(self.cache, batch, HEADS)
        self.step.rows.copy_(torch.arange(batch))
        self.step.position.fill_(length)
        shape = (batch, HEADS + 2 * KV_HEADS, width)
        self.q, self.k, self.v = torch.randn(shape, device=device, dtype=dtype).split([HEADS, KV_HEADS, KV_HEADS], 1)
        self.table = rope_table(self.step.position, width)  # once for all layers, as in the model
        self.weights = torch.ones(width, device=device), torch.ones(width, device=device)
        self.out = torch.empty(batch, HEADS, width, device=device, dtype=dtype)
        whole = (self.layers, 2, batch, KV_HEADS, self.keys_alive, width)
        self.contiguous = torch.randn(whole, device=device, dtype=dtype)

    def ours(self, implementation: str, layer: int) -> Tensor:
        """One layer's step over the paged cache."""
        inputs = (self.q, self.k, self.v, *self.weights, self.step)
        return decode_attention(*inputs, self.cache.local, layer, out=self.out, implementation=implementation)

    def rival(self, attend: Callable[..., Tensor], layer: int) -> Tensor:
        """The same over the contiguous cache: q [B H 1 K], keys and values [B G S K]."""
        q, k = qk_norm_rope(self.q, self.k, *self.weights, *self.table)
        keys, values = self.contiguous[layer]
        keys[:, :, 7], values[:, :, 7] = k, self.v
        return attend(q[:, :, None], keys, values, enable_gqa=True)

    def all_layers(self, one: Callable[[int], Tensor]) -> Callable[[], object]:
        """A call that runs `one` for every layer: a graph's replay on a GPU."""

        def work() -> None:
            for layer in range(self.layers):
                one(layer)

        if self.q.device.type != "cuda":
            return work
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            one(0)
            one(1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def flex_attend(device: str) -> Callable[..., Tensor]:
    """FlexAttention without a mask: every slot is alive. Compiled, it takes its decode kernel for a single query."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else F.scaled_dot_product_attention


@torch.no_grad()
def decode_row(batch: int, width: int, device: str, rounds: int, window: int = WINDOW, landmarks: int = LANDMARKS) -> Row:
    """Microseconds per layer; `extra` holds the rate at which keys and values were read, and torch's own attention."""
    name = f"decode step B={batch} W={window}+{landmarks} K={width} H={HEADS}/{KV_HEADS}"
    problem = Problem(batch, width, device, window, landmarks)
    reason = supports(problem.q, problem.k, problem.cache.local) if device == "cuda" else None
    implementation = "cuda" if device == "cuda" else "torch"
    attend = flex_attend(device)
    calls = {"flex": problem.all_layers(lambda layer: problem.rival(attend, layer))}
    calls["sdpa"] = problem.all_layers(lambda layer: problem.rival(F.scaled_dot_product_attention, layer))
    error = None
    if reason is None:
        truth = problem.ours("torch", 0).clone()
        error = relative_error(problem.ours(implementation, 0), truth)
        calls["ours"] = problem.all_layers(lambda layer: problem.ours(implementation, layer))
    seconds = {who: value / problem.layers for who, value in measure(calls, rounds, warmup=3).items()}
    extra = {f"{who}_tb_per_s": problem.layer_bytes / value / 1e12 for who, value in seconds.items()}
    extra["sdpa_us"] = seconds["sdpa"] * 1e6
    note = reason or GOALS.get(batch, "")
    return compare(
        name, seconds.get("ours"), seconds["flex"], unit="us", must=MUST, aim=AIM, error=error, note=note, extra=extra
    )


def rows(device: str = "cuda", rounds: int = 50, quick: bool = False) -> list[Row]:
    """Batch 1 and 256 at head widths 64 and 128; quick: 128 only, and on a CPU one tiny row."""
    if device == "cpu":
        return [decode_row(2, 64, device, rounds, window=32, landmarks=4)]
    widths = (128,) if quick else (64, 128)
    return [decode_row(batch, width, device, rounds) for batch in (1, 256) for width in widths]
