"""A document as tokens in time order. (The builder `build_stream` lives beside the data it makes.)"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Stream:
    """One document as n tokens. Every array has length n and speaks of token i, except where it says otherwise."""

    ids: np.ndarray
    """int64: id in the vocabulary."""
    modality: np.ndarray
    """int64: index in `MODALITIES` of the segment that the token belongs to (openers, shapes and closers included)."""
    position: np.ndarray
    """int32 [n 3]: rotary axes t, h, w."""
    time: np.ndarray
    """int64: ns on the document's clock; -1 << 62 (`NO_TIME`) for tokens without a clock."""
    channel: np.ndarray
    """int64: channel or dimension of a sensor reading or action, 0 elsewhere."""
    segment: np.ndarray
    """int64: index of the segment in the document; -1 for the document's own tokens."""
    landmark: np.ndarray
    """bool: later tokens of the document see it however far they are."""
    two_way: np.ndarray
    """int32: number of the observed image (or frame) inside which attention is two-way; -1 elsewhere."""
    output_slice: np.ndarray
    """int64: the output slice in which token i itself lies, seen from the position before it."""
    weight: np.ndarray
    """float32: loss weight of token i as a target (0 = context or forced)."""
    features: dict[str, np.ndarray] = field(default_factory=dict)
    """modality -> float32 [k F], one row per token of that modality that carries features, in stream order."""
    feature_at: dict[str, np.ndarray] = field(default_factory=dict)
    """modality -> int64 [k], where those tokens are."""

    def __len__(self) -> int:
        return len(self.ids)


NO_TIME = -(1 << 62)
