"""Attention over packed documents: our CPU path against torch's fused attention with the dense mask, and the price of a layout.

Same tensors for both, forward and backward, grouped queries, window and landmarks. The rival is handed its mask ready-made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from weft.benchmarks.speed.report import Row, compare, finish, measure, relative_error, samples, speed_parser, start
from weft.kernels.attention import attention
from weft.kernels.chunks import chunk_plan
from weft.kernels.layout import StreamLayout

HEADS, KV_HEADS, WIDTH = 4, 2, 64


def stream(length: int, shortest: int, longest: int, image: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """document, landmark, two_way of random documents; first and last tokens are landmarks, one image in each if it fits."""
    sizes = torch.randint(shortest, longest + 1, (length // shortest + 1,))
    document = torch.arange(len(sizes)).repeat_interleave(sizes)[:length].int()
    new = torch.cat([torch.ones(1, dtype=torch.bool), document[1:] != document[:-1]])
    landmark = new | new.roll(-1)
    two_way = torch.full_like(document, -1)
    for number, first in enumerate(new.nonzero()[:, 0].tolist()):
        if image and first + image + 100 < length and sizes[number] > image + 100:
            two_way[first + 100 : first + 100 + image] = number
            landmark[first + 100 + image] = True
    return document, landmark, two_way


def both_ways(layout: StreamLayout, backward: bool) -> tuple[dict[str, Callable[[], list[Tensor]]], float]:
    """Ours and the dense rival as calls that return the output and the gradients."""
    shape = (len(layout), HEADS, WIDTH)
    q, k, v = (torch.randn(len(layout), n, WIDTH, requires_grad=backward) for n in (HEADS, KV_HEADS, KV_HEADS))
    grad, mask = torch.randn(shape), layout.dense_mask()

    def done(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (q, k, v), grad)] if backward else [out]

    def dense() -> list[Tensor]:
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return done(out[0].transpose(0, 1))

    calls = {"ours": lambda: done(attention(q, k, v, layout, backend="sdpa")), "rival": dense}
    return calls, float(mask.float().mean())


def attention_row(name: str, layout: StreamLayout, backward: bool, rounds: int, must: float | None, aim: float | None) -> Row:
    calls, density = both_ways(layout, backward)
    results = {side: call() for side, call in calls.items()}  # the warm-up of both
    error = max(relative_error(a, b) for a, b in zip(results["ours"], results["rival"]))
    time_s = measure(calls, rounds, warmup=0)
    keys = {"density": density, "computed_over_visible": chunk_plan(layout, HEADS, KV_HEADS, WIDTH).area / layout.pairs}
    name += " forward + backward" if backward else " forward"
    return compare(name, time_s["ours"], time_s["rival"], must=must, aim=aim, error=error, extra=keys)


def layout_row(tensors: tuple[Tensor, Tensor, Tensor], window: int, rounds: int) -> Row:
    """Layout, chunk plan and FlexAttention block mask from intervals, against create_block_mask on the same mask."""
    shape = StreamLayout.build(*tensors, window)
    born, dies, length = shape.born, shape.dies, len(shape)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (born[key] <= query) & (query < dies[key])

    def ours() -> None:
        layout = StreamLayout.build(*tensors, window)
        layout.to_block_mask()
        chunk_plan(layout, HEADS, KV_HEADS, WIDTH)

    rival = lambda: create_block_mask(visible, None, None, length, length, device="cpu")  # noqa: E731
    times = samples({"ours": ours, "rival": rival}, rounds)
    medians = {side: sorted(values)[len(values) // 2] for side, values in times.items()}
    return compare(f"layout + plan + block mask, L={length}", medians["ours"], medians["rival"], must=1.0)


def main() -> None:
    args = speed_parser("attention", __doc__ or "").parse_args()
    start(args)
    few, many = (3, 5) if args.quick else (5, 20)
    long = stream(8192, 2000, 3000, image=256)
    middle = StreamLayout.build(*stream(2048, 500, 800, image=256), 256)
    small = StreamLayout.build(*stream(2048 if args.quick else 4096, 20, 120), 512)
    rows = [
        attention_row("L=2048, window 256", middle, False, many, None, None),
        attention_row("L=2048, window 256", middle, True, many, 3.0, 5.0),
        attention_row(f"L={len(small)}, documents of 20 to 120", small, True, few, 3.0, 10.0),
        attention_row("L=8192, window 256", StreamLayout.build(*long, 256), True, 2 if args.quick else few, 10.0, 20.0),
        layout_row(long, 256, few),
    ]
    if not args.quick:
        rows.append(attention_row("L=8192, window 1024", StreamLayout.build(*long, 1024), True, few, None, None))
    finish(rows, args)


if __name__ == "__main__":
    main()
