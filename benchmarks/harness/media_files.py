"""Pictures, films (as strips of frames) and sounds as files that a browser shows."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.media.image import load_image
from weft.tokenizers.media.video import load_video
from weft.tokenizers.segment import Audio, Image, Video

FRAMES = 8
"""Pictures of a strip at most."""


def keep(segment: Any, folder: Path, key: str) -> str:
    """Write a PNG or a 16-bit WAV of an image, a film or a sound; returns the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256(key.encode()).hexdigest()[:16]
    if isinstance(segment, Image):
        write_png(folder / f"{stem}.png", load_image(segment.pixels))
        return f"{stem}.png"
    if isinstance(segment, Video):
        frames = load_video(segment.frames)[0]
        few = frames[np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))]
        write_png(folder / f"{stem}.png", np.concatenate(list(few), axis=1))
        return f"{stem}.png"
    assert isinstance(segment, Audio)
    import soundfile

    samples, rate = segment.samples, int(segment.rate_hz or 8000)
    if not isinstance(samples, np.ndarray):  # a file of the data set, at its own rate
        samples, rate = soundfile.read(io.BytesIO(samples) if isinstance(samples, bytes) else str(samples), always_2d=True)
        samples = samples.mean(axis=1)
    soundfile.write(folder / f"{stem}.wav", np.asarray(samples, np.float32), rate, subtype="PCM_16")
    return f"{stem}.wav"


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Pixels [H W C] in [0, 1] or uint8."""
    import PIL.Image

    levels = pixels if pixels.dtype == np.uint8 else np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    PIL.Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(path)
