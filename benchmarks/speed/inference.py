"""The public inference API against transformers' generate, and what it costs beyond the model.

In: the `tiny` preset with random weights and a small fitted tokenizer, random text prompts. Out: (1) `Generalist.generate`
against `generate` of a transformers Mixtral with our sizes and as many output ids, one prompt and 16; (2) 16 replies in one
call against 16 calls, which must be the same bits; (3) the time to the first token at several prompt lengths, beside
Mixtral's. `generate.py` beside this file times the bare decoding loop, `session.py` sessions, `smaller.py` int8, int4 and
compiled decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.benchmarks.speed.train_step import mixtral
from weft.inference.generalist import Generalist
from weft.inference.prompts import encode
from weft.tokenizers.segment import Text

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


def rival_of(model: Generalist, tokens: int) -> Any:
    """transformers' Mixtral with the model's sizes and as many output ids as a text position has."""
    import transformers

    transformers.logging.set_verbosity_error()
    first, end = model.model.config.slices[0]
    return mixtral(
        dataclasses.replace(model.model.config, vocab_size=end - first, slices=((0, end - first),)), tokens, "eager"
    ).eval()


def rival_call(rival: Any, rows: int, length: int, count: int) -> Callable[[], Any]:
    """Greedy generation of `count` tokens from `rows` random prompts of `length`."""
    prompt = torch.randint(3, rival.config.vocab_size, (rows, length))
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: rival.generate(prompt, attention_mask=mask, **settings)


def against_mixtral(model: Generalist, rows: int, length: int, count: int, rounds: int) -> Row:
    """Tokens a second of greedy generation from `rows` prompts of equally many tokens."""
    prompts = [[words(length, i)] for i in range(rows)]
    tokens = len(encode(model.tokenizer, prompts[0]).stream)
    rival = rival_of(model, tokens + count)
    calls = {
        "ours": lambda: model.generate(prompts, max_tokens=count, min_tokens=count),
        "rival": rival_call(rival, rows, tokens, count),
    }
    made = sum(len(reply.tokens) - 1 for reply in calls["ours"]())  # the closing token is not drawn
    assert made == rows * count, f"{made} tokens instead of {rows * count}"
    speed = {who: rows * count / seconds for who, seconds in measure(calls, rounds=rounds).items()}
    name = f"Generalist.generate, {rows} prompts of about {tokens} tokens, {count} new, against Mixtral"
    return compare(name, speed["ours"], speed["rival"], unit="tok/s", must=1.0, aim=1.5, more_is_better=True)


def first_token(model: Generalist, length: int, rounds: int) -> Row:
    """Time to the first token of one prompt against Mixtral's."""
    prompt = [words(length, length)]
    tokens = len(encode(model.tokenizer, prompt).stream)
    calls = {
        "ours": lambda: model.generate(prompt, max_tokens=1),
        "rival": rival_call(rival_of(model, tokens + 1), 1, tokens, 1),
    }
    took = measure(calls, rounds=rounds)
    note = f"{1e6 * took['ours'] / tokens:.0f} us a token"
    return compare(f"first token after {tokens} tokens, against Mixtral", took["ours"], took["rival"], must=1.0, note=note)


def main() -> None:
    """Run the table."""
    args = speed_parser("inference", __doc__.splitlines()[0]).parse_args()
    start(args)
    model = tiny()
    quick = args.quick
    rounds = 3 if quick else 9
    rows = [against_mixtral(model, count, 64, 16 if quick else 96, rounds) for count in (1, 16)]
    rows.append(batches(model, 8 if quick else 32, rounds))
    rows += [first_token(model, length, rounds) for length in ((128, 1024) if quick else (64, 256, 1024, 4096))]
    finish(rows, args)


if __name__ == "__main__":
    main()
