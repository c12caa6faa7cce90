"""One tiny model with random weights and real, fitted tokenizers, shared by every test of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.inference.generalist import Generalist
from weft.inference.load import load, save
from weft.model.config import ModelConfig
from weft.model.transformer import Transformer
from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.codec import CodecConfig
from weft.tokenizers.codec_fit import CodecFit
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.segment import Action, ActionSpace, Audio, Image, Segment, Sensor, Text, Video
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.stream import StreamConfig
from weft.tokenizers.text import TextTokenizer
from weft.tokenizers.video import VideoConfig, VideoTokenizer

CODEC = CodecConfig(levels=(3, 3, 2), encoder_width=8, decoder_width=8, decoder_blocks=1)
FIT = CodecFit(steps=3, batch_tokens=32)
RATE_HZ = 4000
PUSH = ActionSpace(low=(-2.0, 0.0), high=(2.0, 5.0))


def picture(seed: int = 0, height: int = 8, width: int = 12) -> Image:
    return Image(np.random.default_rng(seed).random((height, width, 1), np.float32))


def sound(seed: int = 0, seconds: float = 0.1) -> Audio:
    return Audio(np.random.default_rng(seed).uniform(-0.5, 0.5, int(RATE_HZ * seconds)).astype(np.float32), rate_hz=RATE_HZ)


def clip(seed: int = 0, frames: int = 3) -> Video:
    return Video(np.random.default_rng(seed).random((frames, 8, 8, 1), np.float32), rate_hz=5.0)


def readings(seed: int = 0, count: int = 5, start: float | None = None) -> Sensor:
    return Sensor(np.random.default_rng(seed).normal(size=(count, 3)), rate_hz=50.0, kind="imu", start=start)


def moves(seed: int = 0, count: int = 2) -> Action:
    return Action(np.random.default_rng(seed).uniform(0, 2, (count, 2)), PUSH, rate_hz=50.0)


def mixed_prompts(count: int, seed: int = 0) -> list[list[Segment]]:
    """Prompts of one to four segments of any modality."""
    rng = np.random.default_rng(seed)
    makers = [
        lambda s: Text("the quick brown fox"[: 3 + s % 16]),
        lambda s: picture(s, 4 * (1 + s % 3), 8),
        lambda s: sound(s, 0.05 + 0.05 * (s % 3)),
        lambda s: clip(s, 1 + s % 3),
        lambda s: readings(s, 1 + s % 5),
        lambda s: moves(s, 1 + s % 3),
    ]
    draw = lambda: makers[int(rng.integers(len(makers)))](int(rng.integers(1000)))  # noqa: E731
    return [[draw() for _ in range(int(rng.integers(1, 5)))] for _ in range(count)]


def make_tokenizer(config: StreamConfig | None = None) -> StreamTokenizer:
    text = TextTokenizer.fit(["the quick brown fox jumps over the lazy dog", "a seven and a nine make sixteen"] * 4, size=288)
    image, _ = ImageTokenizer.fit([picture(i) for i in range(4)], ImageConfig(patch=4, channels=1), CODEC, FIT)
    mel = AudioConfig(sample_rate_hz=RATE_HZ, n_mels=8, hop=40, win=100, frames_per_token=2)
    audio, _ = AudioTokenizer.fit([sound(i) for i in range(4)], mel, CODEC, FIT)
    sensor = SensorTokenizer(SensorConfig(bins=32)).fit("imu", [readings(i, 50).values for i in range(3)], ("x", "y", "z"))
    parts = {
        "text": text,
        "image": image,
        "video": VideoTokenizer(VideoConfig(patch=4, channels=1), image),
        "audio": audio,
        "sensor": sensor,
        "action": ActionTokenizer(ActionConfig(discrete=5, bins=16)),
    }
    return StreamTokenizer.build(parts, config)


def make_model(tokenizer: StreamTokenizer, **changes: object) -> Transformer:
    torch.manual_seed(1)
    vocabulary = tokenizer.vocabulary
    sizes: dict = {
        "width": 48,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 12,
        "experts": 4,
        "experts_per_token": 2,
        "expert_width": 24,
        "shared_width": 40,
        "dense_width": 56,
        "window": 24,
        "full_every": 3,
        "embed_width": 20,
    }
    config = ModelConfig(
        vocab_size=len(vocabulary),
        slices=vocabulary.slices,
        feature_sizes=tokenizer.feature_sizes(),
        num_modalities=len(vocabulary.modalities),
        **{**sizes, **changes},
    )
    model = Transformer(config)
    with torch.no_grad():  # Random weights that are large enough for tokens and experts to differ.
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> StreamTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tokenizer: StreamTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(tokenizer), tokenizer, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(folder: Path) -> Iterator[Generalist]:
    yield load(folder, device="cpu")
