"""int8 and int4 weights and compiled decoding: how fast, how small, and how far the answers move.

In: a checkpoint (`--model`, for example the quickstart's), else the `tiny` preset with random weights; random text prompts.
Out: for each way of loading, the time of greedy generation against the plain float32 model on the same prompts, one and 16
of them. The error is the mean change of a token's log-probability in nats over 16 scored texts; the note gives the share of
the memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from weft.benchmarks.speed.inference import tiny, words
from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.inference.compiled import CompiledModel
from weft.inference.generalist import Generalist
from weft.inference.quantize import quantize_weights, stored_bytes

TEXTS = 16


def quantized(model: Generalist, kind: str) -> Generalist:
    """A copy with smaller weights."""
    inner = copy.deepcopy(model.model)
    quantize_weights(inner, kind)
    return Generalist(inner, model.tokenizer)


def variants(model: Generalist) -> dict[str, Callable[[], Generalist]]:
    """Ways of loading, by name."""
    return {
        "int8": lambda: quantized(model, "int8"),
        "int4": lambda: quantized(model, "int4"),
        "compiled": lambda: Generalist(CompiledModel(model.model), model.tokenizer),
        "compiled int8": lambda: Generalist(CompiledModel(quantized(model, "int8").model), model.tokenizer),
        "compiled int4": lambda: Generalist(CompiledModel(quantized(model, "int4").model), model.tokenizer),
    }


def logprobs(model: Generalist, compiled: bool) -> np.ndarray:
    """Mean log-probability of each of some texts; a compiled model is asked for those of its own greedy replies."""
    prompts = [[words(64, i)] for i in range(TEXTS)]
    if not compiled:
        return np.array([score.mean for score in model.score(prompts, [[words(64, 100 + i)] for i in range(TEXTS)])])
    return np.array([reply.logprobs[reply.drawn].mean() for reply in model.generate(prompts, max_tokens=16, min_tokens=16)])


def replies(model: Generalist, batch: int, count: int) -> Any:
    """`batch` greedy replies of exactly `count` tokens."""
    return model.generate([[words(64, i)] for i in range(batch)], max_tokens=count, min_tokens=count)


def rows(model: Generalist, name: str, make: Callable[[], Generalist], count: int, rounds: int) -> list[Row]:
    """One and 16 replies of `count` tokens, this way against the plain model."""
    begin = time.perf_counter()
    try:
        other = make()
    except (OSError, ModuleNotFoundError) as why:
        return [Row(f"{name} against float32", None, None, "", None, error=str(why))]
    took_to_make = time.perf_counter() - begin
    is_compiled = name.startswith("compiled")
    error = float(np.abs(logprobs(other, is_compiled) - logprobs(model, is_compiled)).mean())
    share = stored_bytes(other.model) / stored_bytes(model.model)
    out = []
    for batch in (1, 16):
        calls = {who: partial(replies, g, batch, count) for who, g in (("ours", other), ("rival", model))}
        took = measure(calls, rounds=rounds, warmup=2)
        note = f"{share:.2f} of the bytes, made in {took_to_make:.0f} s"
        out.append(compare(f"{batch} replies, {name} against float32", took["ours"], took["rival"], error=error, note=note))
    return out


def main() -> None:
    """Run the table."""
    parser = speed_parser("smaller", __doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="checkpoint or run folder; without it, the tiny preset, random weights")
    parser.add_argument("--only", default=None, help="one of the ways of loading")
    args = parser.parse_args()
    start(args)
    if args.model:
        from weft.inference.load import load

        model = load(args.model, device="cpu", dtype="float32")
    else:
        model = tiny()
    chosen = {name: make for name, make in variants(model).items() if args.only in (None, name)}
    found = [rows(model, name, make, 16 if args.quick else 64, 3 if args.quick else 9) for name, make in chosen.items()]
    finish([row for some in found for row in some], args)


if __name__ == "__main__":
    main()
