"""What `generate` gives back: segments to use, and the tokens behind them with their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Text, Video
from weft.tokenizers.stream import Stream

Finish = Literal["done", "max_tokens", "stop"]
Kind = TypeVar("Kind", bound=Segment)


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds of wall clock. They depend on what else is in the batch; nothing else does."""

    first_token_s: float
    """From the call to the first sampled token of this reply."""
    total_s: float
    """From the call to the end of this reply."""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Reply:
    """One generated continuation of one prompt."""

    segments: tuple[Segment, ...]
    """What was produced, decoded, in order."""
    tokens: np.ndarray
    """int64 [n]: ids as the stream holds them, openers, shapes and closers included."""
    logprobs: np.ndarray
    """float32 [n]: log-probability of each token under the model, over its whole output slice. 0 where the token was not
    drawn: the openers and shapes that the call states, kept parts, and closers that the shape or a limit forces."""
    drawn: np.ndarray
    """bool [n]: which tokens the model chose."""
    finish: Finish
    """done: every segment closed by its shape or by the model. max_tokens: at least one was closed by the limit."""
    timings: Timings = field(compare=False)
    parts: tuple[Stream, ...] = field(compare=False, repr=False, default=())
    """The stream of every segment, for `score` and `explain`."""

    def __repr__(self) -> str:
        parts = [repr(s.text) if isinstance(s, Text) else s.modality for s in self.segments]
        return f"Reply({', '.join(parts)}; {len(self.tokens)} tokens, {self.logprob:.2f} nats, {self.finish})"

    @property
    def logprob(self) -> float:
        """Sum over the drawn tokens, in nats."""
        return float(self.logprobs[self.drawn].astype(np.float64).sum())

    @property
    def text(self) -> str:
        """All text segments, joined. Empty if there is none."""
        return "".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def image(self) -> Image | None:
        """The first image."""
        return self._first(Image)

    @property
    def video(self) -> Video | None:
        """The first video."""
        return self._first(Video)

    @property
    def audio(self) -> Audio | None:
        """The first sound."""
        return self._first(Audio)

    @property
    def sensor(self) -> Sensor | None:
        """The first sensor segment."""
        return self._first(Sensor)

    @property
    def action(self) -> Action | None:
        """The first action segment."""
        return self._first(Action)

    def _first(self, kind: type[Kind]) -> Kind | None:
        return next((s for s in self.segments if isinstance(s, kind)), None)


@dataclass(frozen=True)
class Piece:
    """What `generate(..., stream=True)` yields as soon as it can be decoded."""

    segment: int
    """Which segment of the reply it belongs to."""
    modality: str
    content: str | Segment
    """text: the new characters. image: the rows so far as an `Image`. audio: the new stretch. Others: the whole segment."""
    final: bool
    """The last piece of its segment; for media it is the whole segment."""
