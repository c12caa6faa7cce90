"""One block of the `tiny` preset under torch.compile (inductor) against the same block as it is.

In: packed random documents of 20 to 120 tokens. Out: time of forward, and of forward and backward; the error is the largest
relative difference of the output and of all gradients. A compiled block must never be slower than the block itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.benchmarks.speed.report import Row, compare, finish, measure, relative_error, speed_parser, start
from weft.benchmarks.speed.train_step import ROW, VOCAB, data


def calls_of(block: Any, x: Tensor, rotary: Any, layout: Any) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    """Forward without gradients, and forward with backward: the output and every gradient."""

    def forward() -> Tensor:
        with torch.no_grad():
            return block(x, rotary, layout)[0]

    def both() -> list[Tensor]:
        given = x.detach().requires_grad_()
        out, routing = block(given, rotary, layout)
        loss = out.square().mean() if routing is None else out.square().mean() + 1e-3 * routing.logits.square().mean()
        return [out.detach(), *torch.autograd.grad(loss, (given, *block.parameters()))]

    return forward, both


def rows_of(name: str, layer: int, tokens: int, rounds: int) -> list[Row]:
    """Time one layer's block, compiled and not."""
    from weft.model.presets import preset
    from weft.model.transformer import Transformer

    model = Transformer(preset("tiny", vocab_size=VOCAB))
    batch = data(tokens, one_slice=True).batch
    block, rotary, (layout, _) = model.layers[layer], model.rotary(batch.position), model.layouts(batch)
    x = torch.randn(tokens, model.config.width)
    begin = time.perf_counter()
    plain, compiled = calls_of(block, x, rotary, layout), calls_of(torch.compile(block), x, rotary, layout)
    error = relative_error(compiled[0](), plain[0]())
    both_error = max(relative_error(a, b) for a, b in zip(compiled[1](), plain[1](), strict=True))
    note = f"compiled in {time.perf_counter() - begin:.0f} s"
    rows = []
    for i, (what, off) in enumerate((("forward", error), ("forward + backward", both_error))):
        took = measure({"ours": compiled[i], "rival": plain[i]}, rounds)
        rows.append(compare(f"{name}, {what}", took["ours"], took["rival"], must=1.0, error=off, note=note))
    return rows


def main() -> None:
    """Run the table."""
    args = speed_parser("compile_block", __doc__.splitlines()[0]).parse_args()
    start(args)
    tokens, rounds = (2 * ROW, 9) if args.quick else (8 * ROW, 31)
    finish(rows_of("dense block", 0, tokens, rounds) + rows_of("routed block", 1, tokens, rounds), args)


if __name__ == "__main__":
    main()
