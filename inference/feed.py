"""Tokens on their way into the model, and the caches they extend.

In: parts of streams, one per document. Out: the hidden state of every document's last new token, or of all of them. One call
advances any mixture of documents; a document's result does not depend on which others are in the call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.model.cache import StreamCache
from weft.tokenizers.stream import Stream

ROW = ("ids", "modality", "channel", "position", "landmark", "two_way")
"""Arrays of a stream that the model reads, one entry per token."""
TOKENS_PER_CALL = 32_768
"""Tokens that go through the model at once: bounds the memory of a prefill. Documents are never cut."""


@dataclass(frozen=True)
class Part:
    """The next n tokens of one document: what the model reads of a `Stream`."""

    ids: np.ndarray
    modality: np.ndarray
    channel: np.ndarray
    position: np.ndarray
    landmark: np.ndarray
    two_way: np.ndarray
    features: dict[str, np.ndarray]
    feature_at: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


def part_of(stream: Stream) -> Part:
    """A whole stream as one part."""
    return Part(**{name: getattr(stream, name) for name in ROW}, features=stream.features, feature_at=stream.feature_at)


def row_of(stream: Stream, at: int, token: int) -> Part:
    """Token `at` of a stream without features, with another id."""
    rows = {name: getattr(stream, name)[at : at + 1] for name in ROW[1:]}
    return Part(ids=np.array([token], np.int64), **rows, features={}, feature_at={})


def batch_of(parts: Sequence[Part], device: torch.device) -> Any:
    """Parts side by side, with the tensor names that the model reads."""
    lengths = np.array([len(part) for part in parts])
    offset = np.cumsum(lengths) - lengths
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ROW}
    # Block numbers are compared inside a document only, but neighbours must not share one.
    highest = np.cumsum([0] + [int(part.two_way.max(initial=-1)) + 1 for part in parts[:-1]])
    shift = np.repeat(highest, lengths).astype(np.int32)
    if len(parts) > 1:
        arrays["two_way"] = np.where(arrays["two_way"] >= 0, arrays["two_way"] + shift, -1)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
    features, feature_at = {}, {}
    for name in sorted({name for part in parts for name in part.features}):
        having = [(i, part) for i, part in enumerate(parts) if name in part.features]
        features[name] = torch.from_numpy(np.concatenate([part.features[name] for _, part in having])).to(device)
        feature_at[name] = torch.from_numpy(np.concatenate([part.feature_at[name] + offset[i] for i, part in having])).to(
            device
        )
    tensors["document"] = torch.from_numpy(np.repeat(np.arange(len(parts), dtype=np.int32), lengths)).to(device)
    return SimpleNamespace(**tensors, features=features, feature_at=feature_at)


def joined(parts: Sequence[Part]) -> Part:
    """Consecutive parts of one document as one."""
    if len(parts) == 1:
        return parts[0]
    offset = np.cumsum([0] + [len(part) for part in parts])
    names = list(dict.fromkeys(name for part in parts for name in part.features))
    features = {n: np.concatenate([p.features[n] for p in parts if n in p.features]) for n in names}
    places = {n: np.concatenate([p.feature_at[n] + offset[i] for i, p in enumerate(parts) if n in p.features]) for n in names}
    return Part(
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in ROW}, features=features, feature_at=places
    )


def extend(model: Any, caches: Sequence[StreamCache], parts: Sequence[Part]) -> list[Tensor]:
    """Append one part to each cache; hidden states [n D] of each part's tokens, in order."""
    out: list[Tensor] = []
    at = 0
    while at < len(parts):
        end, tokens = at, 0
        while end < len(parts) and (end == at or tokens + len(parts[end]) <= TOKENS_PER_CALL):
            tokens += len(parts[end])
            end += 1
        lengths = [len(part) for part in parts[at:end]]
        hidden = model.extend(batch_of(parts[at:end], model.device), list(caches[at:end]), lengths)
        out += hidden.split(lengths)
        at = end
    return out


def log_probabilities(model: Any, hidden: Tensor, slice_index: int) -> np.ndarray:
    """Hidden states [N D] -> float32 [N slice]: the log-probability of every id of one output slice."""
    return torch.log_softmax(model.logits(hidden, slice_index).float(), -1).cpu().numpy()


def clone(cache: StreamCache) -> StreamCache:
    """An independent copy that keeps a session's own limits (`StreamCache.clone` makes one with the config's)."""
    new = copy.copy(cache)
    for name in ("local", "full"):
        store = copy.copy(getattr(cache, name))
        for field, value in vars(store).items():
            if isinstance(value, Tensor | list):
                setattr(store, field, value.clone() if isinstance(value, Tensor) else list(value))
        setattr(new, name, store)
    return new
