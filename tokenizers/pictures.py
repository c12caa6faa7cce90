"""Side-by-side PNGs of what a codec keeps: originals above, reconstructions below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weft.tokenizers.audio import AudioTokenizer
from weft.tokenizers.image import ImageTokenizer
from weft.tokenizers.media.image import resize, to_channels
from weft.tokenizers.segment import Audio, Image

GAP = 4


def image_pairs(tokenizer: ImageTokenizer, images: Sequence[Image], path: Path, side: int = 96) -> Path:
    """Write the images over what their codes decode to, each scaled to `side` pixels on its longer side."""
    pairs = []
    for image in images:
        pixels = tokenizer.pixels(image)
        tokens = tokenizer.encode(image)
        pairs.append((pixels, tokenizer.decode(tokens.codes, tokens.grid, size=pixels.shape[:2]).pixels))
    return write_pairs([(_fit(a, side), _fit(b, side)) for a, b in pairs], path)


def mel_pairs(tokenizer: AudioTokenizer, sounds: Sequence[Audio], path: Path, zoom: int = 2) -> Path:
    """Write the log-mel spectrograms (time to the right, low frequencies below) over what their codes decode to."""
    pairs, config = [], tokenizer.config
    for sound in sounds:
        tokens = tokenizer.encode(sound)
        assert tokens.features is not None
        before = tokens.features.reshape(-1, config.n_mels) * config.std + config.mean
        pairs.append((before, tokenizer.decode_mel(tokens.codes)))
    low, high = min(float(a.min()) for a, _ in pairs), max(float(a.max()) for a, _ in pairs)
    return write_pairs([tuple(_mel_image(m, low, high, zoom) for m in pair) for pair in pairs], path)


def write_pairs(pairs: Sequence[tuple[np.ndarray, ...]], path: Path) -> Path:
    """Write pictures float32 [H W 3] in two rows on white."""
    import PIL.Image

    rows = [[np.pad(to_channels(p[i], 3), ((0, GAP), (0, GAP), (0, 0)), constant_values=1.0) for p in pairs] for i in (0, 1)]
    height = max(p.shape[0] for row in rows for p in row)
    full = [[np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=1.0) for p in row] for row in rows]
    page = np.concatenate([np.concatenate(row, axis=1) for row in full], axis=0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.rint(page * 255).astype(np.uint8)).save(path, "PNG")
    return path


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """Small images in whole multiples without blurring, large ones shrunk."""
    height, width = pixels.shape[:2]
    if times := side // max(height, width):
        return pixels.repeat(times, axis=0).repeat(times, axis=1)
    share = side / max(height, width)
    return resize(pixels, max(1, round(height * share)), max(1, round(width * share)))


def _mel_image(mel: np.ndarray, low: float, high: float, zoom: int) -> np.ndarray:
    level = np.clip((mel.T[::-1] - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    return level.repeat(zoom, axis=0).repeat(zoom, axis=1)[..., None]
