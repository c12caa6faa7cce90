"""A tiny model with random weights and real tokenizers, and small documents of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image as Picture

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
from weft.tokenizers.segment import Audio, Image
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.text import TextTokenizer
from weft.tokenizers.video import VideoConfig, VideoTokenizer

RATE_HZ = 8000
WORDS = ("dark", "light")


def pixels(i: int, bright: bool) -> np.ndarray:
    return (np.random.default_rng(i).random((8, 8)) * 90 + (150 if bright else 10)).astype(np.uint8)


def sound(i: int, high: bool) -> np.ndarray:
    t = np.arange(1200) / RATE_HZ
    return (0.4 * np.sin(2 * np.pi * (900 if high else 200 + i) * t)).astype(np.float32)


def make_tokenizer() -> StreamTokenizer:
    codec, fit = (
        CodecConfig(levels=(3, 3, 2), encoder_width=8, decoder_width=8, decoder_blocks=1),
        CodecFit(steps=3, batch_tokens=32),
    )
    text = TextTokenizer.fit(["is it dark or light, one, two", "what was said? a seven and a nine make sixteen"] * 4, size=288)
    image, _ = ImageTokenizer.fit(
        [Image(pixels(i, i % 2 == 1)) for i in range(4)], ImageConfig(patch=4, channels=1), codec, fit
    )
    mel = AudioConfig(sample_rate_hz=RATE_HZ, n_mels=8, hop=80, win=200, frames_per_token=2)
    audio, _ = AudioTokenizer.fit([Audio(sound(i, i % 2 == 1), rate_hz=RATE_HZ) for i in range(4)], mel, codec, fit)
    sensor = SensorTokenizer(SensorConfig(bins=32)).fit("cart", [np.random.default_rng(0).normal(size=(50, 4))], tuple("abcd"))
    sensor = sensor.fit("arm", [np.random.default_rng(2).normal(size=(50, 10))], tuple("abcdefghij")) or sensor
    sensor = sensor.fit("metaworld-reach", [np.random.default_rng(3).normal(size=(50, 39))], tuple(f"c{i}" for i in range(39)))
    sensor = sensor.fit("wave", [np.random.default_rng(1).normal(size=(50, 1))], ("x",)) or sensor
    parts = {
        "text": text,
        "image": image,
        "video": VideoTokenizer(VideoConfig(patch=4, channels=1), image),
        "audio": audio,
        "sensor": sensor,
        "action": ActionTokenizer(ActionConfig(discrete=7, bins=16)),
    }
    return StreamTokenizer.build(parts, None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.vocabulary
    config = ModelConfig(
        vocab_size=len(vocabulary),
        slices=vocabulary.slices,
        feature_sizes=tokenizer.feature_sizes(),
        num_modalities=len(vocabulary.modalities),
        width=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=12,
        experts=2,
        experts_per_token=1,
        expert_width=24,
        shared_width=24,
        dense_width=40,
        window=24,
        full_every=2,
        embed_width=20,
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return save(model.eval(), tokenizer, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def tiny(folder: Path) -> Generalist:
    return load(folder, device="cpu")


def segments(i: int, root: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """One document of each kind about the same bit."""
    bit = i % 2
    stem = f"{split}-{i:02d}"
    Picture.fromarray(pixels(i + (100 if split == "train" else 0), bool(bit))).save(root / f"{stem}.png")
    soundfile.write(root / f"{stem}.wav", sound(i, bool(bit)), RATE_HZ)
    wave = [[round(float(np.sin(0.7 * k + i)), 3)] for k in range(9)]
    look, word = {"image": f"{stem}.png", "role": "observed"}, {"text": WORDS[bit], "role": "target"}
    hear = {"audio": f"{stem}.wav", "role": "observed"}
    ask = {"text": "dark or light?", "role": "observed"}
    return {
        "look": [look, ask, word],
        "both": [look, hear, ask, word],
        "draw": [{"text": WORDS[bit], "role": "observed"}, {**look, "role": "target"}],
        "say": [{"text": WORDS[bit], "role": "observed"}, {**hear, "role": "target"}],
        "wave": [{"sensor": wave, "rate_hz": 10, "kind": "wave", "start_s": 0.0, "role": "observed"}],
        "prose": [{"text": f"a seven and {i} make sixteen", "role": "target"}],
        "name": [{"text": WORDS[bit], "role": "observed"}],
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND.test.jsonl and KIND.train.jsonl with a few documents each."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("test", 5), ("train", 6)):
        lines: dict[str, list[str]] = {}
        for i in range(count):
            for kind, pieces in segments(i, root, split).items():
                about = {"label": i % 2, "speaker": f"s{i % 3}", "options": list(WORDS), "answers": [WORDS[i % 2]] * 3}
                line = {"id": f"{kind}/{split}/{i}", "pair": f"bit-{i % 2}", "metadata": about, "segments": pieces}
                lines.setdefault(kind, []).append(json.dumps(line))
        for kind, rows in lines.items():
            (root / f"{kind}.{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root
