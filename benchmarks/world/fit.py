"""The tokenizers of the sample world, fitted on its training documents.

In: a built world. Out: a `StreamTokenizer` for all six modalities and the codec reports. About half a minute on one core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weft.benchmarks.world.documents import QUESTIONS, RECIPES
from weft.benchmarks.world.material import lines
from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.codec import CodecConfig
from weft.tokenizers.codec_fit import CodecFit, CodecReport
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.segment import Audio, Image
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.stream import StreamConfig
from weft.tokenizers.text import TextTokenizer
from weft.tokenizers.video import VideoConfig, VideoTokenizer
from weft.training.parallel import each


@dataclass(frozen=True)
class WorldTokens:
    """How the world's media become tokens: chosen so that a document is 15 to 100 tokens long."""

    text_size: int = 1024
    image_patch: int = 2
    image_levels: tuple[int, ...] = (8, 5, 5)
    video_patch: int = 4
    sample_rate_hz: int = 8000
    n_mels: int = 32
    hop: int = 80
    win: int = 256
    frames_per_token: int = 4
    audio_levels: tuple[int, ...] = (8, 5, 5, 5)
    sensor_bins: int = 128
    action_bins: int = 65
    """Odd: zero is the centre of a bin."""
    codec_steps: int = 800
    pictures: int = 2000
    """Pictures that the image codec is fitted on."""
    sounds: int = 1200
    """Clips that the audio codec is fitted on."""


def segments(world: Path, modality: str) -> Iterator[dict[str, Any]]:
    """Every training segment of one modality, as manifest pieces."""
    for source, recipe in RECIPES.items():
        for line in lines(world, source, "train") if recipe.train else ():
            yield from (piece for piece in line["segments"] if modality in piece)


def paths(world: Path, modality: str) -> list[Path]:
    """The distinct media files of one modality in the training split, sorted."""
    return [world / name for name in sorted({piece[modality] for piece in segments(world, modality)})]


def some(items: list[Path], count: int) -> list[Path]:
    """At most about `count` of the items, evenly spread."""
    return items[:: max(1, len(items) // count)]


def fit_text(world: Path, size: int) -> TextTokenizer:
    """Pieces of the answers, the questions and the prose."""
    asked = [wording.format("") for wordings in QUESTIONS.values() for wording in wordings]
    said = [piece["text"] for piece in segments(world, "text")]
    words = sorted({word for text in said if len(text) < 40 for word in text.replace("?", "").replace(".", "").split()})
    return TextTokenizer.fit([*said, *asked], size, symbols=[*words, *(f" {word}" for word in words)][:200])


def fit_sensors(world: Path, bins: int) -> SensorTokenizer:
    """One scaling per kind, on every reading of the training split."""
    rows: dict[str, list[Any]] = defaultdict(list)
    about: dict[str, dict[str, Any]] = {}
    for piece in segments(world, "sensor"):
        rows[piece["kind"]].append(np.asarray(piece["sensor"], np.float64))
        about[piece["kind"]] = piece
    tokenizer = SensorTokenizer(SensorConfig(bins=bins))
    for kind in sorted(rows):
        names = {key: tuple(about[kind][key]) for key in ("channels", "units") if key in about[kind]}
        tokenizer.fit(kind, rows[kind], method="linear" if kind.startswith("motor") else "quantile", **names)
    return tokenizer


def fit_images(world: Path, config: WorldTokens) -> tuple[ImageTokenizer, CodecReport]:
    """The codec of pictures."""
    pictures = [Image(path) for path in some(paths(world, "image"), config.pictures)]
    shape = ImageConfig(patch=config.image_patch, channels=1)
    return ImageTokenizer.fit(pictures, shape, CodecConfig(levels=config.image_levels), CodecFit(steps=config.codec_steps))


def fit_audio(world: Path, config: WorldTokens) -> tuple[AudioTokenizer, CodecReport]:
    """The codec of sounds."""
    sounds = [Audio(path) for path in some(paths(world, "audio"), config.sounds)]
    shape = AudioConfig(config.sample_rate_hz, config.n_mels, config.hop, config.win, config.frames_per_token)
    codec = CodecConfig(levels=config.audio_levels, decoder_width=96, encoder_width=192)
    return AudioTokenizer.fit(sounds, shape, codec, CodecFit(steps=config.codec_steps))


def fit_tokenizers(
    world: str | Path, config: WorldTokens | None = None, *, progress: Callable[[str, float], None] | None = None
) -> tuple[StreamTokenizer, dict[str, CodecReport]]:
    """Fit all six on the training split of a built world."""
    world, config = Path(world), config or WorldTokens()
    with one_thread():
        return _fit(world, config, progress or (lambda stage, fraction: None))


@contextmanager
def one_thread() -> Iterator[None]:
    """The codecs' matrices are small: a second thread costs more in waiting than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


CODECS: dict[str, Callable[[Path, WorldTokens], Any]] = {"audio": fit_audio, "image": fit_images}
"""The longest first."""


def _codec(world: Path, config: WorldTokens, name: str) -> Any:
    with one_thread():
        return CODECS[name](world, config)


def _fit(world: Path, config: WorldTokens, say: Callable[[str, float], None]) -> tuple[StreamTokenizer, dict[str, CodecReport]]:
    say("text", 0.0)
    text = fit_text(world, config.text_size)
    say("codecs", 0.1)
    made: list[Any] = each(
        partial(_codec, world, config), list(CODECS), done=lambda n, name: say(f"{name} codec", 0.1 + 0.4 * n)
    )
    (audio, audio_report), (image, image_report) = made
    say("sensors", 0.9)
    choices = max(piece["space"].get("n") or 0 for piece in segments(world, "action"))
    tokenizer = StreamTokenizer.build(
        [
            text,
            image,
            VideoTokenizer(VideoConfig(patch=config.video_patch, channels=1)),
            audio,
            fit_sensors(world, config.sensor_bins),
            ActionTokenizer(ActionConfig(discrete=choices, bins=config.action_bins)),
        ],
        StreamConfig(),
        numbers=64,
    )
    say("done", 1.0)
    return tokenizer, {"image": image_report, "audio": audio_report}
