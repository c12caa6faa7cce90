"""What a user hands in: one piece of one modality with its own time span.

In: paths, bytes, PIL images, numpy arrays, torch tensors, strings. Out: `Segment` objects, ordered in a `Document`.
Nothing is decoded here; a tokenizer decodes a segment when it encodes it.

Units: times are int64 nanoseconds inside weft. Where a user gives a time, an `int` means nanoseconds, a `float` means
seconds and a `datetime` must carry a time zone. Pixels are in [0, 1], audio samples in [-1, 1].
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Time = int | float | datetime
Role = Literal["observed", "target", "either"]
"""observed: context, carries features. target: bears loss, codes only. either: drawn per document while training."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Fields that every modality shares."""

    start: Time | None = None
    """When the segment begins; None means it has no clock and keeps its place in the document."""
    role: Role = "either"
    name: str | None = None
    """Shown in errors and reports, for example a file name or a channel group."""

    modality = "abstract"


@dataclass(frozen=True)
class Text(Segment):
    """A sentence or a paragraph."""

    text: str
    modality = "text"


@dataclass(frozen=True)
class Image(Segment):
    """One picture: path, bytes, PIL image, or array [H W], [H W C] or torch [C H W]; uint8 0..255 or float 0..1."""

    pixels: Any
    modality = "image"


@dataclass(frozen=True)
class Video(Segment):
    """Frames at their own times: path, folder of frames, or array [N H W C]; `rate_hz` or one time per frame."""

    frames: Any
    rate_hz: float | None = None
    times: Sequence[Time] | None = None
    modality = "video"


@dataclass(frozen=True)
class Audio(Segment):
    """Sound: path, bytes, or array [N] or [N channels]; arrays need `rate_hz` (samples per second)."""

    samples: Any
    rate_hz: float | None = None
    modality = "audio"


@dataclass(frozen=True)
class Sensor(Segment):
    """Readings [N channels] (or [N] for one channel) at `rate_hz` or at their own `times`; NaN marks a missing reading."""

    values: Any
    rate_hz: float | None = None
    times: Sequence[Time] | None = None
    channels: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None
    kind: str = "default"
    """Which fitted scaling to use: sensors of one kind share it (for example "cartpole" or "imu")."""
    modality = "sensor"


@dataclass(frozen=True)
class ActionSpace:
    """The legal actions: either `n` discrete choices, or a box with one (low, high) pair per dimension."""

    n: int | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(value) for value in given))
        bounds = None if self.low is None or self.high is None else (self.low, self.high)
        if (self.n is None) == (bounds is None):
            raise ValueError("ActionSpace needs either n (discrete) or both low and high (continuous)")
        if bounds and (len(bounds[0]) != len(bounds[1]) or any(not a < b for a, b in zip(*bounds))):
            raise ValueError(f"ActionSpace needs low < high in every dimension, got low={self.low} high={self.high}")
        if self.n is not None:
            if isinstance(self.n, bool) or not hasattr(self.n, "__index__") or operator.index(self.n) < 1:
                raise ValueError(f"ActionSpace needs an integer n >= 1, got {self.n!r}")
            object.__setattr__(self, "n", operator.index(self.n))

    @property
    def dims(self) -> int:
        """Numbers per action."""
        return 1 if self.low is None else len(self.low)


@dataclass(frozen=True)
class Action(Segment):
    """Actions [N dims] (or [N]) taken at `rate_hz` or at their own `times`; ints for a discrete space."""

    values: Any
    space: ActionSpace = field(default_factory=lambda: ActionSpace(n=1))
    rate_hz: float | None = None
    times: Sequence[Time] | None = None
    modality = "action"


@dataclass(frozen=True)
class Document:
    """Segments that belong together: an episode, a captioned clip, a record."""

    segments: tuple[Segment, ...]
    id: str = ""
    source: str = ""
    pair: str | None = None
    """Documents with the same pair key mean the same thing: positives for the contrastive loss."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
