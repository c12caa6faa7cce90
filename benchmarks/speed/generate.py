"""Cached greedy generation of the `tiny` preset against transformers' Mixtral of the same sizes through `generate`.

In: random prompts. Out: generated tokens per second. Both make the same number of tokens from the same prompts; ours reads a
slice of the vocabulary as large as the whole, so that no side has less to do. Our rows are filled up to a multiple of 4 or
more, which makes a document's result independent of the batch and is paid for here; the error column holds it to that: the
share of the first document's tokens that differ when it is alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.benchmarks.speed.train_step import VOCAB, mixtral


def text(ids: Tensor, first: int) -> Any:
    """Tokens [B N] of B text documents that begin at position `first`, side by side."""
    rows, length = ids.shape
    flat = ids.flatten()
    zeros = torch.zeros_like(flat)
    position = torch.arange(first, first + length).repeat(rows)
    return SimpleNamespace(
        ids=flat,
        modality=zeros,
        channel=zeros,
        position=position[:, None].expand(-1, 3),
        document=zeros,
        landmark=zeros.bool(),
        two_way=zeros - 1,
        features={},
        feature_at={},
    )


def ours(model: Any, prompt: Tensor, count: int) -> Callable[[], Tensor]:
    """Greedy decoding with one cache per document."""

    def run() -> Tensor:
        rows, length = prompt.shape
        caches = [model.new_cache() for _ in range(rows)]
        hidden = model.extend(text(prompt, 0), caches, [length] * rows).view(rows, length, -1)[:, -1]
        made = []
        with torch.no_grad():
            for step in range(count):
                made.append(model.logits(hidden, 0).argmax(-1))
                if step + 1 < count:
                    hidden = model.extend(text(made[-1][:, None], length + step), caches, [1] * rows)
        return torch.stack(made, 1)

    return run


def rival(model: Any, prompt: Tensor, count: int) -> Callable[[], Tensor]:
    """The same through transformers."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, **settings)[:, prompt.shape[1] :]


def row(rows: int, length: int, count: int, rounds: int) -> Row:
    """Time both sides."""
    from weft.model.presets import preset
    from weft.model.transformer import Transformer

    config = preset("tiny", vocab_size=VOCAB)
    model = Transformer(config).eval()
    theirs = mixtral(config, length + count, "eager").eval()
    prompt = torch.randint(3, VOCAB, (rows, length))
    calls = {"ours": ours(model, prompt, count), "rival": rival(theirs, prompt, count)}
    shapes = {call().shape for call in calls.values()}
    assert shapes == {torch.Size([rows, count])}, f"the two sides made different numbers of tokens: {shapes}"
    alone, together = ours(model, prompt[:1], count)(), calls["ours"]()[:1]
    error = float((alone != together).float().mean())
    speed = {who: rows * count / seconds for who, seconds in measure(calls, rounds=rounds, warmup=0).items()}
    name = f"{rows} documents, prompt {length}, {count} new tokens"
    return compare(name, speed["ours"], speed["rival"], unit="tok/s", must=1.0, aim=1.5, more_is_better=True, error=error)


def main() -> None:
    """Run the table."""
    args = speed_parser("generate", __doc__.splitlines()[0]).parse_args()
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the rival needs transformers: pip install 'weft[eval]'") from None
    transformers.logging.set_verbosity_error()
    start(args)
    count, rounds = (24, 3) if args.quick else (96, 7)
    finish([row(batch, 100, count, rounds) for batch in (1, 8, 32)] + [row(1, 1000, count, rounds)], args)


if __name__ == "__main__":
    main()
