"""Spoilt inputs: how far do scores fall when the world is not as clean as the training data?

In: a segment, a corruption at a level from 0 to 1, a random generator. Out: the segment spoilt, or itself if the corruption
is about another modality. Levels: blur = standard deviation over the shorter side; noise = standard deviation over
the range of the medium; clip = share of the peak that is cut; dropout = share of readings that are missing; skew = how much
the clock is late, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weft.tokenizers.clock import to_ns
from weft.tokenizers.media.audio import load_audio
from weft.tokenizers.media.image import load_image
from weft.tokenizers.media.video import load_video
from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Video


@dataclass(frozen=True)
class Corruption:
    """One row of the table."""

    kind: str
    level: float

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            raise ValueError(f"no corruption {self.kind!r}; there are {', '.join(CORRUPTIONS)}")
        if not 0 <= self.level <= 1:
            raise ValueError(f"level {self.level} of {self.kind} must lie in [0, 1]")

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.kind} {self.level:g}"

    def touches(self, segment: Segment) -> bool:
        """Whether it changes segments of this kind at all."""
        return isinstance(segment, CORRUPTIONS[self.kind][0]) and (self.kind != "skew" or segment.start is not None)


def corrupt(segment: Segment, corruption: Corruption, rng: np.random.Generator) -> Segment:
    """The segment, spoilt."""
    if not corruption.touches(segment) or corruption.level == 0:
        return segment
    return CORRUPTIONS[corruption.kind][1](segment, corruption.level, rng)


def _repainted(segment: Segment, paint: Callable[[np.ndarray], np.ndarray]) -> Segment:
    """An image or a film with `paint` applied to float32 [N H W C] in [0, 1]; a film keeps the times of its frames."""
    if isinstance(segment, Image):
        return replace(segment, pixels=np.clip(paint(load_image(segment.pixels)[None])[0], 0, 1).astype(np.float32))
    assert isinstance(segment, Video)
    frames, clock = load_video(segment.frames)
    own = segment.rate_hz is None and segment.times is None and clock is not None
    times = tuple(int(t) for t in clock) if own and clock is not None else segment.times
    return replace(segment, frames=np.clip(paint(frames), 0, 1).astype(np.float32), times=times)


def _blur(segment: Segment, level: float, rng: np.random.Generator) -> Segment:
    from scipy.ndimage import gaussian_filter

    def paint(pixels: np.ndarray) -> np.ndarray:
        width = level * min(pixels.shape[1:3])
        return np.asarray(gaussian_filter(pixels, (0, width, width, 0)))

    return _repainted(segment, paint)


def _noise(segment: Segment, level: float, rng: np.random.Generator) -> Segment:
    if isinstance(segment, Image | Video):
        return _repainted(segment, lambda pixels: pixels + rng.normal(0, level, pixels.shape))
    if isinstance(segment, Audio):
        samples, rate = _sound(segment)
        size = level * float(np.abs(samples).max(initial=0.0))
        noisy = np.clip(samples + rng.normal(0, 1, samples.shape) * size, -1, 1)
        return replace(segment, samples=noisy.astype(np.float32), rate_hz=rate)
    assert isinstance(segment, Sensor)
    values = np.asarray(segment.values, np.float64)
    spread = np.nanstd(values, axis=0) if len(values) > 1 else np.abs(values).mean(axis=0)
    return replace(segment, values=values + rng.normal(0, 1, values.shape) * level * spread)


def _sound(segment: Audio) -> tuple[np.ndarray, float]:
    """Samples and rate; files are read at their own rate."""
    rate: float | None = segment.rate_hz
    if not isinstance(segment.samples, np.ndarray):
        import io

        import soundfile

        source: Any = io.BytesIO(segment.samples) if isinstance(segment.samples, bytes) else str(segment.samples)
        rate = float(soundfile.info(source).samplerate)
    if rate is None:
        raise ValueError("a sound as an array needs rate_hz")
    return load_audio(segment.samples, segment.rate_hz, int(rate)), float(int(rate))


def _clip(segment: Segment, level: float, rng: np.random.Generator) -> Segment:
    assert isinstance(segment, Audio)
    samples, rate = _sound(segment)
    peak = float(np.abs(samples).max(initial=0.0)) * (1 - level)
    return replace(segment, samples=np.clip(samples, -peak, peak), rate_hz=rate)


def _dropout(segment: Segment, level: float, rng: np.random.Generator) -> Segment:
    assert isinstance(segment, Sensor)
    values = np.array(segment.values, np.float64)
    lost = rng.random(len(values)) < level
    values[lost] = np.nan
    return replace(segment, values=values)


def _skew(segment: Segment, level: float, rng: np.random.Generator) -> Segment:
    assert segment.start is not None
    shift = round(level * 1e9)
    return replace(segment, start=to_ns(segment.start, segment.name or segment.modality) + shift)


Spoil = Callable[[Segment, float, np.random.Generator], Segment]
CORRUPTIONS: dict[str, tuple[Any, Spoil]] = {
    "blur": ((Image, Video), _blur),
    "noise": ((Image, Video, Audio, Sensor), _noise),
    "clip": ((Audio,), _clip),
    "dropout": ((Sensor,), _dropout),
    "skew": ((Audio, Video, Sensor, Action), _skew),
}
TABLE = tuple(Corruption(kind, level) for kind in CORRUPTIONS for level in (0.1, 0.3))
"""What `--corrupt` runs."""
