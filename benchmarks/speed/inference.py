"""What the public inference API costs beyond the model: batches, first tokens, session steps.

In: the `tiny` preset with random weights and a small fitted tokenizer, random text prompts. Out: (1) 16 replies in one call
against 16 calls, (2) the time to the first token at two prompt lengths against proportional growth, (3) a session's step early
and late, which must cost the same, (4) int8 weights against float32, with the change of a token's log-probability as the error
and the share of the memory. `generate.py` beside this file times the bare decoding loop against transformers.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import numpy as np

from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.inference.generalist import Generalist
from weft.inference.quantize import quantize_int8, stored_bytes
from weft.inference.sampling import Sampling
from weft.inference.session import Sessions
from weft.tokenizers.segment import Sensor, Text

CORPUS = ["the quick brown fox jumps over the lazy dog", "a seven and a nine make sixteen"] * 8


def tiny(**changes: Any) -> Generalist:
    """The `tiny` preset behind a small tokenizer of text, one sensor kind and discrete actions."""
    from weft.model.presets import preset
    from weft.model.transformer import Transformer
    from weft.tokenizers.action import ActionConfig, ActionTokenizer
    from weft.tokenizers.bundle import StreamTokenizer
    from weft.tokenizers.sensor import SensorTokenizer
    from weft.tokenizers.text import TextTokenizer

    sensor = SensorTokenizer().fit("plant", [np.random.default_rng(0).normal(size=(100, 4))])
    parts: list[Any] = [TextTokenizer.fit(CORPUS, 288), sensor, ActionTokenizer(ActionConfig(discrete=8))]
    tokenizer = StreamTokenizer.build(parts)
    vocabulary = tokenizer.vocabulary
    sizes = {"vocab_size": len(vocabulary), "slices": vocabulary.slices, "feature_sizes": tokenizer.feature_sizes()}
    config = preset("tiny", **sizes, num_modalities=len(vocabulary.modalities), **changes)
    return Generalist(Transformer(config), tokenizer)


def words(length: int, seed: int) -> Text:
    """A random text of `length` letters, about as many tokens."""
    return Text("".join(np.random.default_rng(seed).choice(list("abcdefghij"), length)))


def batches(model: Generalist, count: int, rounds: int) -> Row:
    """16 replies of `count` tokens from prompts of different lengths: one call against 16."""
    prompts = [[words(16 + 4 * i, i)] for i in range(16)]
    options: dict[str, Any] = {"max_tokens": count, "min_tokens": count}
    together = lambda: [r.tokens.tolist() for r in model.generate(prompts, **options)]  # noqa: E731
    alone = lambda: [model.generate(p, **options).tokens.tolist() for p in prompts]  # noqa: E731
    error = float(together() != alone())
    took = measure({"ours": together, "rival": alone}, rounds=rounds)
    return compare(
        f"16 replies of {count} tokens: one call against 16", took["ours"], took["rival"], must=2.0, aim=4.0, error=error
    )


def first_token(model: Generalist, short: int, long: int, rounds: int) -> Row:
    """Time to the first token: growth with the prompt's length against proportional growth."""
    calls = {name: (lambda n=n: model.generate([words(n, n)], max_tokens=1)) for name, n in (("short", short), ("long", long))}
    took = measure(calls, rounds=rounds)
    note = f"{took['short'] * 1e3:.1f} ms at {short}"
    return compare(
        f"first token after {long} letters against {long // short} x {short}",
        took["long"],
        took["short"] * long / short,
        must=1.0,
        note=note,
    )


def session_steps(model: Generalist, group: int, steps: int, window: int) -> Row:
    """A control step of `group` sessions: the median of the first `window` steps after the memory is full against the last."""
    spec: dict[str, Any] = {"space": 4, "full_tokens": 512, "landmarks": 128, "sampling": Sampling()}
    sessions = Sessions([model.session(**spec) for _ in range(group)])
    took = []
    for k in range(steps):
        reading = Sensor(np.random.default_rng(k).normal(size=(1, 4)), rate_hz=50.0, kind="plant")
        begin = time.perf_counter()
        sessions.push([reading] * group, k * 20_000_000)
        sessions.act()
        took.append(time.perf_counter() - begin)
    full = 512 // 11 * 2  # a step is 11 tokens
    early, late = statistics.median(took[full : full + window]), statistics.median(took[-window:])
    tokens = len(sessions.sessions[0])
    name = f"session step of {group}, at {tokens} tokens against {full * 11}"
    return compare(name, late, early, must=0.8, aim=1.0, note=f"{1e3 * late / group:.2f} ms a session")


def int8(model: Generalist, count: int, rounds: int) -> Row:
    """16 replies with int8 weights against float32; the error is the mean change of a token's log-probability in nats."""
    small = Generalist(copy.deepcopy(model.model), model.tokenizer)
    quantize_int8(small.model)
    prompts = [[words(64, i)] for i in range(16)]
    whats = [[words(64, 100 + i)] for i in range(16)]
    means = [np.array([s.mean for s in g.score(prompts, whats)]) for g in (small, model)]
    calls = {
        name: (lambda g=g: g.generate(prompts, max_tokens=count, min_tokens=count))
        for name, g in (("ours", small), ("rival", model))
    }
    took = measure(calls, rounds=rounds)
    share = stored_bytes(small.model) / stored_bytes(model.model)
    error = float(np.abs(means[0] - means[1]).mean())
    return compare(
        "16 replies, int8 against float32 weights", took["ours"], took["rival"], error=error, note=f"{share:.2f} bytes"
    )


def main() -> None:
    """Run the table."""
    args = speed_parser("inference", __doc__.splitlines()[0]).parse_args()
    start(args)
    model = tiny()
    quick = args.quick
    rows = [
        batches(model, 8 if quick else 32, 3 if quick else 7),
        first_token(model, 128, 1024 if quick else 4096, 3 if quick else 7),
        int8(model, 8 if quick else 32, 3 if quick else 7),
        session_steps(tiny(max_landmarks=128), 4 if quick else 20, 300 if quick else 9_100, 60 if quick else 200),
    ]
    finish(rows, args)


if __name__ == "__main__":
    main()
