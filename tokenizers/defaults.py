"""Sensible tokenizers fitted on the documents themselves: what `weft inspect` and first experiments use without a checkpoint.

In: documents. Out: a `StreamTokenizer` that encodes all of their modalities and decodes most: image, video and sound codecs are
trained for a few seconds on what is there, so their pictures are rough.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.audio import AudioTokenizer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.codec import CodecConfig
from weft.tokenizers.codec_fit import CodecFit
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.segment import Action, Audio, Document, Image, Segment, Sensor, Text, Video
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.stream import StreamConfig
from weft.tokenizers.text import TextTokenizer
from weft.tokenizers.video import VideoConfig, VideoTokenizer

logger = logging.getLogger(__name__)

_CODEC = CodecConfig(levels=(8, 5, 5, 5), encoder_width=96, decoder_width=32, decoder_blocks=1)
_FRAMES = 24  # frames of each video that the codec is fitted on


def default_tokenizer(
    documents: Document | Iterable[Document],
    config: StreamConfig | None = None,
    *,
    steps: int = 400,
    patch: int = 16,
    max_side: int = 320,
    max_rate_hz: float = 5.0,
    text_size: int = 512,
) -> StreamTokenizer:
    """Fit every tokenizer that the documents need. `steps` are optimizer steps of each codec; 0 leaves media input-only.

    `patch` and `max_side` are pixels, `max_rate_hz` the most frames per second that are kept of a video.
    """
    documents = [documents] if isinstance(documents, Document) else list(documents)
    segments = [segment for document in documents for segment in document.segments]
    fitted: list[Any] = []
    texts = [s.text for s in segments if isinstance(s, Text)]
    if texts:
        fitted.append(_text(texts, text_size))
    fitted += _pictures(segments, steps, ImageConfig(patch=patch, max_side=max_side), max_rate_hz)
    sounds = [s for s in segments if isinstance(s, Audio)]
    if sounds:
        fit = CodecFit(steps=max(steps, 1))
        fitted.append(AudioTokenizer.fit(sounds, codec=_CODEC, fit=fit)[0] if steps else AudioTokenizer())
    sensors = [s for s in segments if isinstance(s, Sensor)]
    if sensors:
        fitted.append(_sensor(sensors))
    actions = [s for s in segments if isinstance(s, Action)]
    if actions:
        count = max((s.space.n or 0 for s in actions), default=0)
        fitted.append(ActionTokenizer(ActionConfig(discrete=count, bins=256)))
    return StreamTokenizer.build(fitted, config)


def _text(texts: Sequence[str], size: int) -> TextTokenizer:
    kept = [text for text in texts if text.strip()] or ["the"]
    quiet = logging.getLogger("weft.tokenizers.text")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # a document is a small corpus; that the vocabulary shrinks is no news here
    try:
        return TextTokenizer.fit(kept * 2, size=size)
    finally:
        quiet.setLevel(level)


def _pictures(segments: Sequence[Segment], steps: int, config: ImageConfig, max_rate_hz: float) -> list[Any]:
    """Image and video tokenizers with one codec between them."""
    images = [s for s in segments if isinstance(s, Image)]
    videos = [s for s in segments if isinstance(s, Video)]
    if not images and not videos:
        return []
    video = VideoTokenizer(VideoConfig(patch=config.patch, max_side=config.max_side, max_rate_hz=max_rate_hz))
    image = ImageTokenizer(config)
    if steps:
        material: list[Image] = list(images)
        for segment in videos:
            frames, _ = video.frames(segment)
            picked = np.unique(np.linspace(0, len(frames) - 1, _FRAMES).astype(np.int64))
            material += [Image(pixels=frames[i]) for i in picked]
        image = ImageTokenizer.fit(material, config, _CODEC, CodecFit(steps=steps))[0]
        video = video.with_image(image)
    return [tokenizer for tokenizer, used in ((image, images), (video, videos)) if used]


def _sensor(sensors: Sequence[Sensor]) -> SensorTokenizer:
    tokenizer = SensorTokenizer(SensorConfig(bins=1024))
    kinds: dict[str, list[Sensor]] = {}
    for segment in sensors:
        kinds.setdefault(segment.kind, []).append(segment)
    for kind, members in kinds.items():
        tokenizer.fit(kind, members, members[0].channels, members[0].units)
    return tokenizer


def name_kinds(document: Document) -> Document:
    """Sensors without a kind get one per number of channels, so that unlike sensors are not scaled together."""
    segments = []
    for segment in document.segments:
        if isinstance(segment, Sensor) and segment.kind == "default":
            shape = np.shape(segment.values)
            channels = shape[1] if len(shape) > 1 else 1
            segment = replace(segment, kind=segment.name or f"default-{channels}")
        segments.append(segment)
    return replace(document, segments=tuple(segments))
