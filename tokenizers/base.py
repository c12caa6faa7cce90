"""The contract of a tokenizer: media in, `Tokens` out, and back.

`Tokens` speak the modality's own language: codes count from zero inside the modality's span, times count from the
segment's start. `Vocabulary` moves codes into the one id space, `stream` moves times onto the document's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from weft.tokenizers.segment import Segment


@dataclass(frozen=True)
class Tokens:
    """One segment's body: n tokens in the order in which the model reads them."""

    codes: np.ndarray
    """int64 [n]: 0 <= code < span size, or -1 where the tokenizer has no quantizer (input only)."""
    grid: tuple[int, ...]
    """The shape that the opening tokens state: image (h, w), video (frames, h, w), audio (n,), sensor (readings, channels),
    action (steps, dims), text (n,)."""
    time: np.ndarray
    """int64 [n]: nanoseconds after the segment's start."""
    features: np.ndarray | None = None
    """float32 [n F]: raw continuous content (pixels, mel frames, scaled values); None for text and discrete actions."""
    place: np.ndarray | None = None
    """int32 [n 2]: (h, w) place of each token: patch row and column, or channel and place in the tick; None = zeros."""
    group: int = 1
    """Tokens that must stay together when streams are merged by time: a frame's patches, a reading's channels."""

    def __len__(self) -> int:
        return len(self.codes)


@runtime_checkable
class Tokenizer(Protocol):
    """Turns segments of one modality into tokens and codes back into media."""

    modality: str
    feature_size: int
    """F of `Tokens.features`, 0 if there are none."""

    @property
    def size(self) -> int:
        """Codes in this tokenizer's part of the span (0 = input only)."""
        ...

    def encode(self, segment: Segment) -> Tokens: ...

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Segment:
        """Codes [n] back to a segment. Raises `ValueError` where the tokenizer is input only."""
        ...

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON only."""
        ...

    def digest(self) -> str:
        """SHA-256 over everything that changes what `encode` or `decode` returns."""
        ...
