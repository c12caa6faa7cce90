"""Why a reply came out as it did: which segments mattered, who looked at whom, which experts worked.

In: a prompt and a reply to it. Out: an `Explanation`: numbers as JSON, and one self-contained HTML page with the media.

- leave-one-out: how much less likely the reply is (nats) without each segment of the prompt. Costs one scoring per segment.
- gradient x input: the sum over a segment's tokens of |embedding . gradient of the reply's log-likelihood| (arXiv 1312.6034,
  1605.01713). One backward pass. It says what the model is sensitive to, not what it would do without the segment.
- attention flow: mean attention, over layers, heads and tokens, that each segment's tokens pay to each segment: computed from
  the layers' own queries and keys with the dense mask. Attention shows where the model looked, not why (arXiv 1902.10186).
- experts: share of each routed layer's choices per modality.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.inference.errors import PromptError
from weft.inference.feed import batch_of, part_of
from weft.inference.generate import decode
from weft.inference.prompts import Prompt, encode
from weft.inference.reply import Reply
from weft.inference.score import Score, continuation, counted, log_likelihoods
from weft.inference.writer import rewrite
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.segment import Segment, Text
from weft.tokenizers.stream import Stream, join

LIMIT = 4096
"""Tokens of prompt and reply at most: dense attention of a whole layer is held at once."""


@dataclass(frozen=True)
class Part:
    """One segment of the prompt or of the reply."""

    label: str
    modality: str
    role: str
    """prompt or reply."""
    tokens: int
    leave_one_out: float | None = None
    """Nats by which the reply is less likely without it; None for the reply and where the prompt has only one segment."""
    gradient: float | None = None
    """Share of the gradient x input over the prompt's segments; they sum to one."""


@dataclass(frozen=True)
class Explanation:
    """Everything that the page shows, as numbers."""

    parts: tuple[Part, ...]
    logprob: float
    """Of the reply, nats."""
    attention: tuple[tuple[float, ...], ...]
    """[parts + 1][parts + 1]: share of a part's attention (row) that goes to each part (column); the last is `<doc>`."""
    experts: dict[str, tuple[tuple[float, ...], ...]]
    """modality -> [routed layers][experts], shares of its tokens' choices."""
    tokens: tuple[tuple[str, float], ...]
    """Of the reply: what each counted token is, and its log-probability."""
    segments: tuple[Segment, ...] = field(default=(), compare=False, repr=False)
    """The media behind `parts`."""

    def to_json(self) -> str:
        """Numbers only."""
        facts = asdict(replace(self, segments=()))
        del facts["segments"]
        return json.dumps(facts, indent=1)

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write `path` as a page and the numbers beside it as JSON."""
        from weft.inference.explain_page import page

        path = Path(path).with_suffix(".html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(self), encoding="utf-8")
        path.with_suffix(".json").write_text(self.to_json() + "\n", encoding="utf-8")
        return path, path.with_suffix(".json")


def explain(model: Any, tokenizer: StreamTokenizer, prompt: Any, reply: Any) -> Explanation:
    """Explain a reply (a `Reply`, a string or segments) to a prompt. At most `LIMIT` tokens."""
    encoded = encode(tokenizer, prompt)
    answer = continuation(tokenizer, encoded, reply)
    total = len(encoded.stream) + len(answer)
    if total > LIMIT:
        raise PromptError(f"prompt and reply have {total} tokens, explain takes {LIMIT}; shorten the prompt")
    score = log_likelihoods(model, tokenizer, [encoded], [[answer]])[0][0]
    whole = join([encoded.stream, answer])
    spans = _spans(encoded, answer, tokenizer)
    trace = _Trace(model, whole, counted(tokenizer, answer), len(encoded.stream))
    shares = trace.gradient_shares(spans[: len(encoded.segments)])
    gone = leave_one_out(model, tokenizer, encoded, reply, score)
    parts = []
    media = [*encoded.segments, *_media(tokenizer, answer)]
    for i, ((where, modality), segment) in enumerate(zip(spans, media)):
        asked = i < len(encoded.segments)
        parts.append(
            Part(
                _label(segment, i),
                modality,
                "prompt" if asked else "reply",
                int(where.sum()),
                gone[i] if asked and gone else None,
                shares[i] if asked else None,
            )
        )
    attention = trace.attention([where for where, _ in spans])
    experts = trace.experts(tokenizer.modalities)
    return Explanation(tuple(parts), score.total, attention, experts, _tokens(tokenizer, score), tuple(media))


def leave_one_out(model: Any, tokenizer: StreamTokenizer, prompt: Prompt, reply: Any, score: Score) -> list[float]:
    """Nats by which the reply is less likely without each segment; [] where there is only one."""
    if len(prompt.segments) < 2:
        return []
    without = []
    for i in range(len(prompt.segments)):
        without.append(encode(tokenizer, [s for j, s in enumerate(prompt.segments) if j != i]))
    # A reply's tokens are scored as they are, at the positions that they have behind the shorter prompt.
    streams = [[_again(tokenizer, shorter, reply)] for shorter in without]
    scores = log_likelihoods(model, tokenizer, without, streams)
    return [score.total - some[0].total for some in scores]


def _again(tokenizer: StreamTokenizer, prompt: Prompt, reply: Any) -> Stream:
    """The reply's own codes behind another prompt."""
    if not isinstance(reply, Reply):
        return continuation(tokenizer, prompt, reply)
    return rewrite(tokenizer, prompt.builder, reply.parts)


def _spans(prompt: Prompt, answer: Stream, tokenizer: StreamTokenizer) -> list[tuple[np.ndarray, str]]:
    """bool [tokens] and modality of every segment: the prompt's in the order they were handed in, then the reply's."""
    n = len(prompt.stream)
    own = np.concatenate([prompt.stream.segment, np.full(len(answer), -1)])
    order = sorted(range(len(prompt.stream.info)), key=lambda i: prompt.stream.info[i].source)
    spans = [(own == i, prompt.stream.info[i].modality) for i in order]
    for number in dict.fromkeys(answer.segment[answer.segment >= 0].tolist()):
        where = np.concatenate([np.zeros(n, bool), answer.segment == number])
        spans.append((where, tokenizer.modalities[int(answer.modality[answer.segment == number][0])]))
    return spans


def _media(tokenizer: StreamTokenizer, answer: Stream) -> list[Segment]:
    return decode(tokenizer, [answer])


def _label(segment: Segment, i: int) -> str:
    if isinstance(segment, Text):
        return segment.text if len(segment.text) <= 60 else segment.text[:57] + "..."
    held = getattr(segment, {"image": "pixels", "video": "frames", "audio": "samples"}.get(segment.modality, ""), None)
    return segment.name or (Path(held).name if isinstance(held, str | Path) else f"{segment.modality} {i + 1}")


def _tokens(tokenizer: StreamTokenizer, score: Score) -> tuple[tuple[str, float], ...]:
    return tuple((_word(tokenizer, int(t)), float(p)) for t, p, use in zip(score.tokens, score.logprobs, score.counted) if use)


def _word(tokenizer: StreamTokenizer, token: int) -> str:
    """A token in words: the characters of a text piece, else its name."""
    first, end = tokenizer.vocabulary.spans["text"]
    if first <= token < end:
        piece = tokenizer.tokenizers["text"].decode(np.array([token - first]), (1,))
        text = piece.text if isinstance(piece, Text) else ""
        return text if text and "\ufffd" not in text else tokenizer.vocabulary.describe(token)
    return tokenizer.vocabulary.describe(token)


class _Trace:
    """One pass over prompt and reply whose insides are kept: embeddings with gradient, queries and keys, routing."""

    def __init__(self, model: Any, whole: Stream, use: np.ndarray, start: int) -> None:
        # Hooks go on a copy of the modules that shares the tensors: other threads may be using the model.
        model = getattr(model, "inner", model)  # only a step of decoding is compiled
        shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.model, self.whole, self.use, self.start = copy.deepcopy(model, shared), whole, use, start
        self.batch = batch_of([part_of(whole)], model.device)

    def gradient_shares(self, spans: Sequence[tuple[np.ndarray, str]]) -> list[float]:
        """Share of |embedding . gradient| of each span of the prompt."""
        kept: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_(True)
            kept.append(leaf)
            return leaf

        handle = self.model.embedding.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                hidden = self.model(self.batch).hidden
                total = hidden.new_zeros(())
                for i in np.flatnonzero(self.use):
                    at = self.start + int(i)
                    where = int(self.whole.output_slice[at])
                    first = self.model.config.slices[where][0]
                    row = torch.log_softmax(self.model.logits(hidden[at - 1 : at], where).float(), -1)[0]
                    total = total + row[int(self.whole.ids[at]) - first]
                (gradient,) = torch.autograd.grad(total, kept)
        finally:
            handle.remove()
        strength = (kept[0].detach() * gradient).sum(-1).abs().float().cpu().numpy()
        sums = np.array([float(strength[where].sum()) for where, _ in spans])
        return (sums / max(sums.sum(), 1e-30)).tolist()

    @torch.no_grad()
    def attention(self, spans: Sequence[np.ndarray]) -> tuple[tuple[float, ...], ...]:
        """[spans + 1][spans + 1]: share of each span's attention that goes to each span."""
        group = np.full(len(self.whole), len(spans))
        for i, where in enumerate(spans):
            group[where] = i
        pick = torch.nn.functional.one_hot(torch.from_numpy(group), len(spans) + 1).float().to(self.model.device)
        flow = torch.zeros((len(spans) + 1, len(spans) + 1), device=self.model.device)
        local, full = self.model.layouts(self.batch)
        masks = {id(layout): layout.dense_mask() for layout in (local, full)}

        def hook(layer: int) -> Any:
            def look(module: Any, inputs: Any) -> None:
                x, rotary, _ = inputs
                q, k, _ = module.project(x, rotary)
                k = k.repeat_interleave(module.heads // module.kv_heads, 1)
                mask = masks[id(full if self.model.config.is_full(layer) else local)]
                for head in range(module.heads):
                    scores = (q[:, head].float() @ k[:, head].float().T) / module.head_width**0.5
                    weight = scores.masked_fill(~mask, float("-inf")).softmax(-1)
                    flow.add_(pick.T @ weight @ pick)

            return look

        handles = [b.attention.register_forward_pre_hook(hook(i)) for i, b in enumerate(self.model.blocks)]
        try:
            self.model(self.batch)
        finally:
            for handle in handles:
                handle.remove()
        shares = flow / flow.sum(-1, keepdim=True).clamp(min=1e-30)
        return tuple(tuple(round(v, 6) for v in row) for row in shares.cpu().tolist())

    @torch.no_grad()
    def experts(self, names: Sequence[str]) -> dict[str, tuple[tuple[float, ...], ...]]:
        """modality -> [routed layers][experts]."""
        load = self.model(self.batch).router.load.float()
        out = {}
        for m, name in enumerate(names):
            if load.numel() and float(load[:, m].sum()):
                share = load[:, m] / load[:, m].sum(-1, keepdim=True).clamp(min=1)
                out[name] = tuple(tuple(round(v, 6) for v in row) for row in share.cpu().tolist())
        return out
