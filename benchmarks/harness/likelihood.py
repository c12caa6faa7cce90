"""Log-likelihood of continuations behind prompts, of which some may be empty.

`Generalist.score` refuses an empty prompt, which is right for a user and wrong for a perplexity: a text without a prompt is
scored behind the document's opening alone. Rivals answer both by their own `score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.inference.generalist import Generalist
from weft.inference.prompts import Prompt, encode
from weft.inference.score import Score, continuation, log_likelihoods


def score_all(model: Any, prompts: Sequence[Sequence[Any]], whats: Sequence[Sequence[Any]]) -> list[Score]:
    """One score per (prompt, continuation)."""
    if not isinstance(model, Generalist):
        return list(model.score([list(p) for p in prompts], [list(w) for w in whats]))
    tokenizer = model.tokenizer
    encoded = [encode(tokenizer, list(p)) if p else _opening(model) for p in prompts]
    streams = [[continuation(tokenizer, p, list(w))] for p, w in zip(encoded, whats, strict=True)]
    return [found[0] for found in log_likelihoods(model.model, tokenizer, encoded, streams)]


def _opening(model: Generalist) -> Prompt:
    builder = model.tokenizer.builder()
    return Prompt((), builder.open(), builder)
