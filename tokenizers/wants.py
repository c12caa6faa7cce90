"""What a generated piece must be, and what a parsed piece is: the words of the grammar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.tokenizers.segment import ActionSpace
from weft.tokenizers.stream import StreamError

Range = tuple[int, int]
"""(first, end) of ids or places."""


@dataclass(frozen=True)
class Want:
    """What a generated piece must be. The constructors below say it in the words of each modality."""

    modality: str
    shape: tuple[int, ...] | None = None
    """The numbers of the opening tokens; None leaves them to the model."""
    min_tokens: int = 1
    """Fewest body tokens of a variable body."""
    max_tokens: int | None = None
    """Most body tokens; a free shape is bounded by it as well."""
    span: str | None = None
    """The span of the codes where a modality has several (discrete, bins, chunks)."""
    codes: int | None = None
    """Only the first so many codes of the span, for example the n of a discrete action space."""
    missing: bool = False
    """Whether a sensor body may say `<missing>`."""

    def __post_init__(self) -> None:
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1)):
            raise StreamError(
                f"a {self.modality} of {self.min_tokens}..{self.max_tokens} tokens does not exist; give min <= max"
            )
        if self.codes is not None and self.codes < 1:
            raise StreamError(f"a {self.modality} needs at least one legal code, got {self.codes}")

    @classmethod
    def text(cls, max_tokens: int | None = None, min_tokens: int = 1) -> Want:
        return cls("text", min_tokens=min_tokens, max_tokens=max_tokens)

    @classmethod
    def image(cls, h: int, w: int) -> Want:
        """An image of h x w patches."""
        return cls("image", shape=(h, w))

    @classmethod
    def video(cls, frames: int, h: int, w: int) -> Want:
        """A video of `frames` temporal patches of h x w patches."""
        return cls("video", shape=(frames, h, w))

    @classmethod
    def audio(cls, min_tokens: int = 1, max_tokens: int | None = None) -> Want:
        return cls("audio", min_tokens=min_tokens, max_tokens=max_tokens)

    @classmethod
    def sensor(cls, channels: int, readings: int | None = None, missing: bool = False) -> Want:
        """Exactly `readings` readings of `channels` channels, or as many as the model says."""
        count = None if readings is None else readings * channels
        return cls("sensor", shape=(channels,), min_tokens=count or channels, max_tokens=count, missing=missing)

    @classmethod
    def action(cls, space: ActionSpace, steps: int | None = 1) -> Want:
        """Exactly `steps` actions of a space (None: as many as the model says)."""
        count = None if steps is None else steps * space.dims
        span = "bins" if space.n is None else "discrete"
        return cls("action", (space.dims,), count or space.dims, count, span, space.n)


@dataclass(frozen=True)
class Piece:
    """One piece of a parsed stream."""

    modality: str
    start: int
    """Its first token, a timestamp included."""
    end: int
    """The token after its closing token."""
    body: Range
    """(first, end) of its body."""
    shape: tuple[int, ...]
    """The numbers of its opening tokens."""
    codes: np.ndarray
    """int64 [n]: local codes, -1 where a hole stands."""
    span: str | None = None
    """The span of its codes; None if there are only holes."""
    stamp: int | None = None
    """Centiseconds of its timestamp."""
    complete: bool = True
