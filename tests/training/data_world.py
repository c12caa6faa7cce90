"""A small folder of real media and its manifest, and a tokenizer for it. Deterministic; media come again in many documents."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile

from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.text import TextTokenizer
from weft.tokenizers.video import VideoConfig, VideoTokenizer

WORDS = ["red", "green", "blue", "disc", "square", "tone", "high", "low", "left", "right", "cart", "pole", "falls", "stands"]


def write_media(folder: Path, images: int = 5, sounds: int = 3) -> None:
    """PNG pictures 16 x 24, FLAC tones of 0.2 s."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        PIL.Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / f"picture{i}.png")
    for i in range(sounds):
        wave = 0.3 * np.sin(2 * np.pi * (300 + 100 * i) * np.arange(1600) / 8000)
        soundfile.write(folder / f"tone{i}.flac", wave, 8000)


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 11))


def episode(i: int, steps: int = 12) -> dict[str, Any]:
    """A control episode: two channels and a discrete action at 10 Hz."""
    t = np.arange(steps) / 10
    values = np.stack([np.sin(t * (1 + i % 5)), np.cos(t + i)], axis=1)
    return {
        "id": f"episode{i}",
        "source": "control",
        "metadata": {"task": f"task{i % 2}"},
        "segments": [
            {"sensor": values.round(6).tolist(), "rate_hz": 10, "start_s": 0.0, "kind": "cart", "name": "state"},
            {"action": [int(v > 0) for v in values[:, 0]], "space": {"n": 3}, "rate_hz": 10, "start_s": 0.0, "role": "target"},
        ],
    }


def documents(count: int) -> list[dict[str, Any]]:
    """Captioned pictures, spoken notes, plain text and episodes in turn; every tenth is held out."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        kind = i % 4
        if kind == 0:
            doc = {
                "segments": [{"image": f"picture{i % 5}.png", "role": "observed"}, {"text": sentence(i)}],
                "source": "captions",
            }
        elif kind == 1:
            doc = {"segments": [{"audio": f"tone{i % 3}.flac"}, {"text": sentence(i), "role": "target"}], "source": "notes"}
        elif kind == 2:
            doc = {"segments": [{"text": sentence(i)}], "source": "text"}
        else:
            doc = episode(i)
        made.append({"id": f"doc{i}", **doc, "split": "val" if i % 10 == 9 else "train"})
    return made


def write_manifest(folder: Path, docs: list[dict[str, Any]], name: str = "manifest.jsonl") -> Path:
    write_media(folder)
    path = folder / name
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return path


@functools.cache
def tokenizer() -> StreamTokenizer:
    """Input-only image and audio, fitted text, sensor and action."""
    text = TextTokenizer.fit([sentence(i) for i in range(200)], size=300)
    image = ImageTokenizer(ImageConfig(patch=8))
    audio = AudioTokenizer(AudioConfig(sample_rate_hz=8000, n_mels=8, hop=80, win=200))
    sensor = SensorTokenizer(SensorConfig(bins=64)).fit("cart", [np.random.default_rng(0).uniform(-1, 1, (200, 2))])
    action = ActionTokenizer(ActionConfig(discrete=3, bins=16))
    return StreamTokenizer.build([text, image, VideoTokenizer(VideoConfig(patch=8), image), audio, sensor, action])
