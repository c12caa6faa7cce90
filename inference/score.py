"""How likely a continuation is: log-probabilities token by token, for scoring and for choices.

In: filled caches and the streams of continuations. Out: float32 log-probabilities over the output slice of every token, and
which of them count: bodies and predicted closing tokens, not the openers and shapes that a caller states, nor the closers that
a shape forces.
The same conventions as in the loss and in `Reply.logprobs`, so that scoring a reply gives its own numbers back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.inference.errors import PromptError
from weft.inference.feed import clone, extend, log_probabilities, part_of
from weft.inference.prompts import Prompt, as_segments, prefill
from weft.inference.reply import Reply
from weft.inference.writer import fork
from weft.model.cache import StreamCache
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.grammar import parse
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.segment import Text
from weft.tokenizers.stream import Stream, join

ROWS = 1024
"""Rows of one logits product: bounds its memory at ROWS * slice * 4 bytes."""
CLONES = 64
"""Continuations that are read at once: bounds the memory of cloned caches."""


@dataclass(frozen=True)
class Score:
    """The log-probabilities of one continuation."""

    tokens: np.ndarray
    """int64 [n]."""
    logprobs: np.ndarray
    """float32 [n], nats, over the output slice of each token."""
    counted: np.ndarray
    """bool [n]: bodies and predicted closing tokens."""
    modality: tuple[str, ...]
    """Modality of each token, [n]."""
    text_bytes: int
    """UTF-8 bytes of the text in the continuation."""

    @property
    def total(self) -> float:
        """Sum over the counted tokens."""
        return float(self.logprobs[self.counted].astype(np.float64).sum())

    @property
    def mean(self) -> float:
        """Per counted token."""
        return self.total / max(int(self.counted.sum()), 1)

    @property
    def by_modality(self) -> dict[str, float]:
        """Sum over the counted tokens of each modality."""
        names = np.array(self.modality)
        return {
            name: float(self.logprobs[self.counted & (names == name)].astype(np.float64).sum()) for name in dict.fromkeys(names)
        }

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text, closing token included; None without text."""
        if not self.text_bytes:
            return None
        return -self.by_modality.get("text", 0.0) / np.log(2) / self.text_bytes


def continuation(tokenizer: StreamTokenizer, prompt: Prompt, what: Any) -> Stream:
    """The tokens of a continuation after a prompt, as they would be generated (codes without features)."""
    if isinstance(what, Reply):
        if not what.parts:
            raise PromptError("this reply was built without its stream; score its segments instead")
        return join(list(what.parts))
    segments = [replace(segment, role="target") for segment in as_segments(what, "continuation")]
    unread = [s.modality for s in segments if not getattr(tokenizer.tokenizers.get(s.modality), "size", 0)]
    if unread:
        raise PromptError(f"the continuation holds {unread[0]}, for which this model has no codes; it can only be in a prompt")
    stream = fork(prompt.builder).add(tokenizer.prepare(segments), PRESETS["instruct"])
    assert stream is not None
    return stream


@torch.inference_mode()
def log_likelihoods(
    model: Any, tokenizer: StreamTokenizer, prompts: Sequence[Prompt], continuations: Sequence[Sequence[Stream]]
) -> list[list[Score]]:
    """The scores of each prompt's continuations. A prompt is read once and shared by its continuations."""
    filled = prefill(model, prompts)
    flat = [(p, stream) for p, streams in enumerate(continuations) for stream in streams]
    scores: list[Score] = []
    for first in range(0, len(flat), CLONES):
        some = flat[first : first + CLONES]
        scores += _read(model, tokenizer, [(*filled[p], stream) for p, stream in some])
    rest = iter(scores)
    return [[next(rest) for _ in streams] for streams in continuations]


def _read(model: Any, tokenizer: StreamTokenizer, items: Sequence[tuple[StreamCache, Tensor, Stream]]) -> list[Score]:
    """Score streams behind filled caches, which stay as they are."""
    long = [(cache, stream) for cache, _, stream in items if len(stream) > 1]
    caches = [clone(cache) for cache, _ in long]
    parts = [part_of(stream.take(np.arange(len(stream) - 1))) for _, stream in long]
    read = iter(extend(model, caches, parts))
    before = [torch.cat([hidden[None], next(read)]) if len(stream) > 1 else hidden[None] for _, hidden, stream in items]
    hidden = torch.cat(before)
    ids = np.concatenate([stream.ids for _, _, stream in items])
    slices = np.concatenate([stream.output_slice for _, _, stream in items])
    logprobs = np.zeros(len(ids), np.float32)
    for where in np.unique(slices):
        rows = np.flatnonzero(slices == where)
        for block in np.array_split(rows, -(-len(rows) // ROWS)):
            table = log_probabilities(model, hidden[torch.from_numpy(block).to(hidden.device)], int(where))
            logprobs[block] = table[np.arange(len(block)), ids[block] - model.config.slices[where][0]]
    ends = np.cumsum([len(stream) for _, _, stream in items])
    return [_score(tokenizer, stream, logprobs[end - len(stream) : end]) for (_, _, stream), end in zip(items, ends)]


def _score(tokenizer: StreamTokenizer, stream: Stream, logprobs: np.ndarray) -> Score:
    names = tokenizer.modalities
    text = 0
    for info, codes in tokenizer.segments(stream):
        segment = tokenizer.decode_segment(codes, info) if info.modality == "text" else None
        text += len(segment.text.encode()) if isinstance(segment, Text) else 0
    return Score(stream.ids, logprobs, counted(tokenizer, stream), tuple(names[m] for m in stream.modality), text)


def counted(tokenizer: StreamTokenizer, stream: Stream) -> np.ndarray:
    """bool [n]: bodies and predicted closing tokens of a stream of whole segments."""
    mask = np.zeros(len(stream), bool)
    for piece in parse(stream.ids, tokenizer.vocabulary, tokenizer.registry, inside=True):
        first, end = piece.body
        mask[first:end] = True
        mask[end : piece.end] = not tokenizer.entries[piece.modality].fixed
    return mask
