"""What a user hands in as a prompt, as segments, as a stream, and as a filled cache.

In: a string, a segment, a document, or a list that mixes them. Out: `Prompt`: the stream so far and the builder that goes on
with it. A list whose members are themselves lists, tuples or documents is a batch of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from weft.inference.errors import PromptError
from weft.inference.feed import extend, part_of
from weft.model.cache import StreamCache
from weft.tokenizers.build import StreamBuilder
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.segment import Document, Segment, Text
from weft.tokenizers.stream import Stream, join

LIMIT = 1 << 18
"""Tokens of a prompt at most: a guard against a file of the wrong kind, not a property of the model."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised."""

    segments: tuple[Segment, ...]
    stream: Stream
    builder: StreamBuilder

    def text_ids(self, tokenizer: StreamTokenizer) -> set[int]:
        """Text pieces in the prompt."""
        first, end = tokenizer.vocabulary.spans["text"]
        ids = self.stream.ids
        return set(ids[(ids >= first) & (ids < end)].tolist())


def is_batch(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts: its members are lists, tuples or documents."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(p, list | tuple | Document) for p in prompt)


def as_segments(prompt: Any, what: str = "prompt") -> tuple[Segment, ...]:
    """The segments of one prompt. Raises `PromptError` for an empty one or a member of another type."""
    if isinstance(prompt, Document):
        prompt = prompt.segments
    items = [prompt] if isinstance(prompt, str | Segment) else prompt
    if not isinstance(items, list | tuple):
        raise PromptError(
            f"a {what} is a string, a segment, a document or a list of these, got {type(prompt).__name__}; "
            "wrap media, for example weft.Image(pixels)"
        )
    if not items:
        raise PromptError(f"the {what} is empty; give at least one string or segment")
    wrong = [type(item).__name__ for item in items if not isinstance(item, str | Segment)]
    if wrong:
        raise PromptError(f"a {what} holds a {wrong[0]}; wrap it, for example weft.Image(pixels) or weft.Sensor(values)")
    return tuple(Text(item) if isinstance(item, str) else item for item in items)


def encode(tokenizer: StreamTokenizer, prompt: Any, what: str = "prompt", may_be_empty: bool = False) -> Prompt:
    """Tokenise one prompt as observed context, left open for what follows."""
    nothing = may_be_empty and isinstance(prompt, list | tuple | str) and not len(prompt)
    segments = () if nothing else tuple(replace(segment, role="observed") for segment in as_segments(prompt, what))
    _known(tokenizer, segments, what)
    builder = tokenizer.builder()
    parts = [builder.open(), builder.add(tokenizer.prepare(segments))]
    stream = join([part for part in parts if part is not None])
    if len(stream) > LIMIT:
        raise PromptError(f"the {what} has {len(stream)} tokens, at most {LIMIT} are read; shorten it or push it to a session")
    return Prompt(segments, stream, builder)


def _known(tokenizer: StreamTokenizer, segments: Sequence[Segment], what: str) -> None:
    for segment in segments:
        if segment.modality not in tokenizer.tokenizers:
            have = ", ".join(tokenizer.tokenizers)
            raise PromptError(f"the {what} holds {segment.modality}, this model reads {have}; drop it or train with it")


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[Prompt]) -> list[tuple[StreamCache, torch.Tensor]]:
    """A filled cache and the last hidden state [D] for every prompt, all in one call."""
    caches = [model.new_cache() for _ in prompts]
    hidden = extend(model, caches, [part_of(prompt.stream) for prompt in prompts])
    return [(cache, states[-1]) for cache, states in zip(caches, hidden)]


@torch.inference_mode()
def bare(model: Any, tokenizer: StreamTokenizer) -> tuple[StreamCache, torch.Tensor]:
    """The cache of a document that is only `<doc>`: what classifier-free guidance compares with."""
    cache = model.new_cache()
    (hidden,) = extend(model, [cache], [part_of(tokenizer.builder().open())])
    return cache, hidden[-1]
