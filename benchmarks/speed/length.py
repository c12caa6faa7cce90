"""Attention time per token as the stream grows at a fixed window: it must not grow.

The rival of every row is the shortest stream: a ratio of 1 is flat, 1 / 1.2 is 20 % slower. Packed documents of 2,048 tokens
keep the work per token equal. In one single document the work itself grows until the window is full (`keys` in the JSON
file: 768 visible keys per query at L = 2,048, 992 at 16,384); the dense mask would give L / 2.
"""

from __future__ import annotations

import torch

from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.kernels.attention import attention
from weft.kernels.layout import StreamLayout

WINDOW, DOCUMENT = 1024, 2048


def call_of(length: int, document: int, heads: int, kv_heads: int, width: int) -> tuple[StreamLayout, object]:
    number = torch.arange(length, dtype=torch.int32) // document
    layout = StreamLayout.build(number, torch.zeros(length, dtype=torch.bool), torch.full_like(number, -1), WINDOW)
    q, k, v = (torch.randn(length, n, width, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    grad = torch.randn(length, heads, width)
    return layout, lambda: torch.autograd.grad(attention(q, k, v, layout), (q, k, v), grad)


def rows_of(name: str, lengths: list[int], document: int | None, rounds: int, must: float | None) -> list[Row]:
    made = {length: call_of(length, document or length, 4, 2, 32) for length in lengths}
    time_s = measure({str(length): call for length, (_, call) in made.items()}, rounds)  # type: ignore[misc]
    per_token = {length: time_s[str(length)] / length for length in lengths}
    return [
        compare(f"{name}, L={length}, per token", per_token[length], per_token[lengths[0]], unit="us", must=must,
                extra={"keys": made[length][0].pairs / length})
        for length in lengths
    ]  # fmt: skip


def main() -> None:
    args = speed_parser("length", __doc__ or "").parse_args()
    start(args)
    lengths, rounds = [2048, 4096, 8192, 16384], 3 if args.quick else 9
    rows = rows_of("documents of 2,048", lengths, DOCUMENT, rounds, 1 / 1.2)
    rows += rows_of("one document", lengths, None, rounds, None)
    finish(rows, args)


if __name__ == "__main__":
    main()
