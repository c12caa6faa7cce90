"""int8 and int4 weights and compiled decoding: how fast, how small, and how far the answers move.

In: a checkpoint (`--model`, for example the quickstart's), else the `tiny` preset with random weights. Out: for each way of
loading, the time of greedy generation against the plain float32 model on the same prompts, one and 16 of them. The error is
the mean change of a token's log-probability, in nats: of `TEXTS`, scored, where weights are smaller; of the plain model's own
replies where only the decoding step is compiled, since scoring reads texts as before. The note says how many bits a byte of
`TEXTS` costs, the share of the memory, and the seconds it took to quantize and compile.
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

TEXTS = (
    "The list of names was written down in the order in which they came.",
    "Nobody had seen the ship since it left the harbour in the morning.",
    "A function returns its value to the place from which it was called.",
    "When the rain stopped, the children went out to play in the street.",
    "This license does not grant permission to use the name of the author.",
    "He said that the answer was simple, and then he did not give it.",
)
PROMPT = 16
"""Letters of a timed prompt: what is timed is decoding."""
BATCHES = (1, 16)
USUAL = ("int8", "int4", "compiled")
"""Ways that are timed if none is named. A compiler's first run takes minutes; torch keeps what it made for the next one."""


def quantized(model: Generalist, kind: str) -> Generalist:
    """A copy with smaller weights."""
    inner = copy.deepcopy(model.model)
    quantize_weights(inner, kind)
    return Generalist(inner, model.tokenizer)


def compiled(model: Generalist) -> Generalist:
    """The same weights with a compiled step."""
    return Generalist(CompiledModel(model.model), model.tokenizer)


def variants(model: Generalist) -> dict[str, Callable[[], Generalist]]:
    """Ways of loading, by name."""
    return {
        "int8": lambda: quantized(model, "int8"),
        "int4": lambda: quantized(model, "int4"),
        "compiled": lambda: compiled(model),
        "compiled int8": lambda: compiled(quantized(model, "int8")),
    }


def scored(model: Generalist) -> tuple[np.ndarray, float]:
    """The log-probability of every token of `TEXTS`, and the bits that one of their bytes costs."""
    scores = model.score([[] for _ in TEXTS], list(TEXTS))
    nats = np.concatenate([score.logprobs[score.counted] for score in scores]).astype(np.float64)
    return nats, -float(nats.sum()) / np.log(2) / sum(score.text_bytes for score in scores)


def replies(model: Generalist, batch: int, count: int) -> Any:
    """`batch` greedy replies of exactly `count` tokens."""
    return model.generate([[words(PROMPT, i)] for i in range(batch)], max_tokens=count, min_tokens=count)


def moved(model: Generalist, other: Generalist, count: int) -> float:
    """Mean change of a reply's log-probabilities, as far as both say the same tokens."""
    found = []
    for a, b in zip(replies(model, BATCHES[-1], count), replies(other, BATCHES[-1], count)):
        same = int(np.cumprod(a.tokens == b.tokens).sum())
        found.append(np.abs(a.logprobs - b.logprobs)[:same])
    return float(np.concatenate(found).mean())


def rows(model: Generalist, name: str, make: Callable[[], Generalist], count: int, budget_s: float) -> list[Row]:
    """One and 16 replies of `count` tokens, this way against the plain model."""
    begin = time.perf_counter()
    try:
        other = make()
    except (OSError, ModuleNotFoundError) as why:
        return [Row(f"{name} against float32", None, None, "", None, error=str(why))]
    made_s = time.perf_counter() - begin
    (plain, plain_bits), (mine, bits) = scored(model), scored(other)
    error = moved(model, other, count) if name == "compiled" else float(np.abs(plain - mine).mean())
    share = stored_bytes(other.model) / stored_bytes(model.model)
    note = f"{bits:.3f} bits per byte, float32 {plain_bits:.3f}; {share:.2f} of the bytes; made in {made_s:.0f} s"
    extra = {"bits_per_byte": bits, "plain_bits_per_byte": plain_bits, "share_of_bytes": share, "made_s": made_s}
    out = []
    for batch in BATCHES:
        calls = {who: partial(replies, g, batch, count) for who, g in (("ours", other), ("rival", model))}
        took = measure(calls, rounds=9, budget_s=budget_s)
        title = f"{batch} replies, {name} against float32"
        out.append(compare(title, took["ours"], took["rival"], error=error, note=note, extra=extra))
    return out


def main() -> None:
    """Run the table."""
    parser = speed_parser("smaller", __doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="checkpoint or run folder; without it, the tiny preset, random weights")
    parser.add_argument("--only", default=None, help="int8, int4, compiled, or 'compiled int8'; else the first three")
    args = parser.parse_args()
    start(args)
    if args.model:
        from weft.inference.load import load

        model = load(args.model, device="cpu", dtype="float32")
    else:
        model = tiny()
    ways = variants(model)
    if args.only not in (None, *ways):
        parser.error(f"--only {args.only}: there is {', '.join(ways)}")
    chosen = {name: ways[name] for name in ([args.only] if args.only else USUAL)}
    count, budget_s = (8, 1.0) if args.quick else (32, 8.0)
    finish([row for name, make in chosen.items() for row in rows(model, name, make, count, budget_s)], args)


if __name__ == "__main__":
    main()
