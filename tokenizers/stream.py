"""A document as tokens in time order: the arrays, what is known of its segments, and how it is written.

`interleave.py` orders the segments, `positions.py` places them on the rotary axes, `build.py` writes the arrays.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

NO_TIME = -(1 << 62)


class StreamError(ValueError):
    """Segments, tokens or ids that cannot stand in a stream as they are."""


@dataclass(frozen=True)
class Resample:
    """A model that reads a medium through a resampler: `latents` positions stand for every `tokens` of its feature rows."""

    tokens: int
    """Feature rows in a group: a multiple of `latents`. The last group of a medium may have fewer."""
    latents: int
    """Positions that the stream holds for a group."""

    def __post_init__(self) -> None:
        if not all(type(n) is int and 1 <= n <= 65536 for n in (self.tokens, self.latents)) or self.tokens % self.latents:
            raise StreamError(
                f"stream.resample: tokens={self.tokens!r} must be a multiple of latents={self.latents!r}, both from 1 to 65536"
            )

    @property
    def rows(self) -> int:
        """Feature rows that a position carries."""
        return self.tokens // self.latents


@dataclass(frozen=True)
class StreamConfig:
    """How segments with a clock are merged, how time is written, and which observed media are shortened."""

    chunk_s: float = 2.0
    """Seconds of one modality before the next one's turn when clocks are merged; 0 merges reading by reading."""
    tick_s: float = 0.04
    """Seconds per step of the t axis (40 ms as in TMRoPE, arXiv 2503.20215)."""
    timestamps: bool = False
    """Write `<time> n n n n` (centiseconds of the document) before every chunk of a clocked segment, where it has moved on."""
    resample: dict[str, Resample] = field(default_factory=dict)
    """modality -> resampler through which observed media (image, video, audio) are read. A second of them then costs its
    feature rows * latents / tokens positions."""

    def __post_init__(self) -> None:
        if not isinstance(self.resample, dict):
            raise StreamError(f"stream.resample must map modalities to tokens and latents, found {self.resample!r}")
        object.__setattr__(self, "resample", {name: _resample(name, value) for name, value in sorted(self.resample.items())})
        if not (math.isfinite(self.chunk_s) and self.chunk_s >= 0):
            raise StreamError(f"stream.chunk_s={self.chunk_s} must be 0 (finest) or a number of seconds")
        if not (math.isfinite(self.tick_s) and self.tick_s >= 1e-6):
            raise StreamError(f"stream.tick_s={self.tick_s} must be at least a microsecond; 0.04 is usual")

    @property
    def chunk_ns(self) -> int:
        return round(self.chunk_s * 1e9)

    @property
    def tick_ns(self) -> int:
        return round(self.tick_s * 1e9)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamConfig:
        """From JSON or YAML; an unknown key is an error."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise StreamError(f"stream config has unknown keys {unknown}; known are {sorted(f.name for f in fields(cls))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not used is not named, so that a digest is that of a config which never knew it."""
        return {name: value for name, value in asdict(self).items() if name != "resample" or value}


def _resample(name: str, value: Any) -> Resample:
    if isinstance(value, Resample):
        return value
    if not isinstance(value, dict) or set(value) != {"tokens", "latents"}:
        raise StreamError(f"stream.resample[{name}] needs the keys tokens and latents, found {value!r}")
    return Resample(**value)


@dataclass(frozen=True)
class SegmentInfo:
    """What the tokens of one segment do not say, but decoding needs."""

    modality: str
    grid: tuple[int, ...]
    """`Tokens.grid` of the whole segment."""
    group: int
    """Tokens that always stay together."""
    start: int | None
    """ns on the document's clock, None without a clock."""
    target: bool
    """Bears loss: codes without features."""
    source: int
    """Index of the segment in the document as it was handed in."""
    name: str | None = None
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [groups]: ns of each group after the segment's start."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields of the user's segment (rate_hz, times, channels, units, kind, space)."""
    medium: SegmentInfo | None = None
    """What was read through a resampler, as it was before: here `grid`, `group` and `times` are those of the latents."""

    def part(self, first: int, count: int) -> SegmentInfo:
        """The same of `count` of its tokens from `first` on, whole groups."""
        groups = slice(first // self.group, (first + count) // self.group)
        times, given = self.times[groups], self.fields.get("times")
        begin = int(times[0]) if len(times) else 0
        fields = dict(self.fields)
        if given is not None:
            of_groups = np.array(given if len(given) == len(self.times) else [], np.int64)[groups] - begin
            fields["times"] = tuple(of_groups.tolist()) or None
        return replace(
            self,
            grid=(count // math.prod(self.grid[1:]), *self.grid[1:]),
            start=None if self.start is None else self.start + begin,
            times=times - begin,
            fields=fields,
            medium=None,
        )


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
    """int64: index in `info`: segments are numbered as they first appear in the stream; -1 for the document's own tokens."""
    landmark: np.ndarray
    """bool: later tokens of the document see it however far they are."""
    two_way: np.ndarray
    """int32: number of the observed image (or frame) inside which attention is two-way; -1 elsewhere."""
    output_slice: np.ndarray
    """int64: the output slice in which token i itself lies, seen from the position before it."""
    weight: np.ndarray
    """float32: loss weight of token i as a target (0 = context or forced)."""
    features: dict[str, np.ndarray] = field(default_factory=dict)
    """modality -> float32 [k F], one row per token of that modality that carries features, in stream order. Resampled media
    have tokens / latents rows of theirs side by side; rows beyond the end of a medium are NaN."""
    feature_at: dict[str, np.ndarray] = field(default_factory=dict)
    """modality -> int64 [k], where those tokens are."""
    info: tuple[SegmentInfo, ...] = ()
    """One entry per segment."""
    pair: str | None = None
    """The document's pair key, for the contrastive loss."""
    id: str = ""
    """The document's id, for reports."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> Stream:
        """The tokens at `index` (int64, may repeat), with their features."""
        arrays = {name: getattr(self, name)[index] for name in ARRAYS}
        features, feature_at = {}, {}
        for name, at in self.feature_at.items():
            row = np.full(len(self), -1, np.int64)
            row[at] = np.arange(len(at))
            kept = row[index]
            feature_at[name] = np.flatnonzero(kept >= 0)
            features[name] = self.features[name][kept[kept >= 0]]
        return Stream(**arrays, features=features, feature_at=feature_at, info=self.info, pair=self.pair, id=self.id)


ARRAYS = (
    "ids",
    "modality",
    "position",
    "time",
    "channel",
    "segment",
    "landmark",
    "two_way",
    "output_slice",
    "weight",
)
"""Fields of `Stream` with one entry per token."""


def join(parts: list[Stream]) -> Stream:
    """Parts of one document, in order (as a session writes them), as one stream."""
    if not parts:
        raise StreamError("join needs at least one part")
    offset = np.cumsum([0] + [len(part) for part in parts])
    names = list(dict.fromkeys(name for part in parts for name in part.feature_at))
    last = parts[-1]
    return Stream(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS},
        features={m: np.concatenate([part.features[m] for part in parts if m in part.features]) for m in names},
        feature_at={
            m: np.concatenate([part.feature_at[m] + offset[i] for i, part in enumerate(parts) if m in part.feature_at])
            for m in names
        },
        info=last.info,
        pair=last.pair,
        id=last.id,
    )
