"""Six small real tokenizers and any mixture of segments for them."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.base import Tokenizer, Tokens
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.clock import segment_times
from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Segment, Sensor, Text, Video
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.stream import StreamConfig
from weft.tokenizers.text import TextTokenizer

LEVELS = 17
"""Grey levels of the quantising media tokenizers below."""
BOX = ActionSpace(low=(-1.0, 0.0), high=(1.0, 5.0))
"""Continuous action space of the mixtures."""


@dataclass
class _Levels:
    """Grey levels as codes: exact, tiny, and with features, so that whole documents can be compared."""

    modality: str
    size: int = LEVELS
    feature_size: int = 2

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def digest(self) -> str:
        return f"levels {self.modality} {self.size}"

    def code(self, values: Any) -> np.ndarray:
        return np.rint(np.asarray(values, np.float64) * (LEVELS - 1)).astype(np.int64).reshape(-1)

    def features(self, codes: np.ndarray) -> np.ndarray:
        return np.stack([codes / LEVELS, 1 - codes / LEVELS], axis=1).astype(np.float32)


class LevelImage(_Levels):
    """One token per pixel of a [H W] image."""

    def encode(self, segment: Segment) -> Tokens:
        h, w = segment.pixels.shape  # type: ignore[attr-defined]
        codes = self.code(segment.pixels)  # type: ignore[attr-defined]
        place = np.stack([np.arange(h).repeat(w), np.tile(np.arange(w), h)], axis=1).astype(np.int32)
        return Tokens(codes, (h, w), np.zeros(h * w, np.int64), self.features(codes), place, h * w)

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Image:
        return Image(pixels=codes.reshape(grid) / (LEVELS - 1))


class LevelVideo(_Levels):
    """One token per pixel of [N H W] frames."""

    def encode(self, segment: Segment) -> Tokens:
        n, h, w = segment.frames.shape  # type: ignore[attr-defined]
        codes = self.code(segment.frames)  # type: ignore[attr-defined]
        place = np.stack([np.arange(h).repeat(w), np.tile(np.arange(w), h)], axis=1).astype(np.int32)
        time = segment_times(segment, n).repeat(h * w)
        return Tokens(codes, (n, h, w), time, self.features(codes), np.tile(place, (n, 1)), h * w)

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Video:
        return Video(frames=codes.reshape(grid) / (LEVELS - 1))


class LevelAudio(_Levels):
    """One token per sample, at the segment's own rate."""

    def encode(self, segment: Segment) -> Tokens:
        codes = self.code(segment.samples)  # type: ignore[attr-defined]
        return Tokens(codes, (len(codes),), segment_times(segment, len(codes)), self.features(codes))

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Audio:
        return Audio(samples=codes / (LEVELS - 1), rate_hz=shape.get("rate_hz"))


@lru_cache
def text_tokenizer() -> TextTokenizer:
    """A real SentencePiece model, trained on a few words."""
    logging.getLogger("weft.tokenizers.text").setLevel(logging.ERROR)
    return TextTokenizer.fit(["the ball falls", "a red ball, a blue box", "turn left, then stop"] * 2, size=290)


@lru_cache
def tokenizers() -> dict[str, Tokenizer]:
    """Text, sensor and action as shipped; image, video and audio exact to the grey level."""
    sensor = SensorTokenizer(SensorConfig(bins=61))
    for channels in (1, 2, 3):
        sensor.fit(f"k{channels}", [np.linspace(-1, 1, 101)[:, None].repeat(channels, 1)], method="linear")
    return {
        "text": text_tokenizer(),
        "image": LevelImage("image"),
        "video": LevelVideo("video"),
        "audio": LevelAudio("audio"),
        "sensor": sensor,
        "action": ActionTokenizer(ActionConfig(discrete=7, bins=41)),
    }


@lru_cache
def bundle(chunk_s: float = 2.0, timestamps: bool = False) -> StreamTokenizer:
    return StreamTokenizer.build(tokenizers(), StreamConfig(chunk_s=chunk_s, timestamps=timestamps))


# -- any mixture

starts = st.none() | st.integers(0, 20_000).map(lambda ms: ms * 1_000_000)
rates = st.sampled_from([0.5, 1.0, 3.0, 10.0, 29.97, 100.0, 160.0])
roles = st.sampled_from(["observed", "target", "either"])
names = st.sampled_from([None, "a", "b"])
seeds = st.integers(0, 2**16)


@st.composite
def segments(draw: Any, clocked: bool | None = None) -> Segment:
    """One segment of any modality, with or without a clock."""
    start = draw(starts) if clocked is None else (draw(starts.filter(lambda s: s is not None)) if clocked else None)
    common: dict[str, Any] = {"start": start, "role": draw(roles), "name": draw(names)}
    kind = draw(st.sampled_from(["text", "image", "video", "audio", "sensor", "discrete", "box"]))
    rng = np.random.default_rng(draw(seeds))
    if kind == "text":
        return Text(text=draw(st.text(max_size=12)), **common)
    n = draw(st.integers(1, 7))
    clock: dict[str, Any] = {"rate_hz": draw(rates)}
    if kind in ("video", "sensor", "box", "discrete") and draw(st.booleans()) and clocked is not False:
        clock = {"times": tuple(int(t) for t in np.sort(rng.integers(0, 5_000_000_000, n)))}
    if kind == "image":
        return Image(pixels=rng.random((n, draw(st.integers(1, 4)))), **common)
    if kind == "video":
        return Video(frames=rng.random((n, draw(st.integers(1, 3)), 2)), **clock, **common)
    if kind == "audio":
        return Audio(samples=rng.random(n * 3), rate_hz=draw(rates), **common)
    if kind == "sensor":
        channels = draw(st.integers(1, 3))
        values = rng.uniform(-1, 1, (n, channels))
        values[rng.random((n, channels)) < 0.2] = np.nan
        return Sensor(values=values, kind=f"k{channels}", **clock, **common)
    if kind == "discrete":
        return Action(values=rng.integers(0, 5, n), space=ActionSpace(n=5), **clock, **common)
    return Action(values=rng.uniform(0, 1, (n, 2)), space=BOX, **clock, **common)


documents = st.builds(
    lambda parts, pair: Document(segments=tuple(parts), pair=pair),
    st.lists(segments(), max_size=7),
    st.sampled_from([None, "one", "two"]),
)


def moved(segment: Segment, **changes: Any) -> Segment:
    return replace(segment, **changes)


def as_bytes(array: np.ndarray) -> bytes:
    """A .npy file in memory."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()
