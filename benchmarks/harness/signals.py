"""Per-sample measures of sound and of forecasts, and plain features of media that a stated classical method can use.

In: segments or arrays. Out: numbers, or a feature vector float64 [F] of fixed size per modality.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from weft.benchmarks.harness.metrics import coverage, crps, mase
from weft.tokenizers.media.audio import load_audio
from weft.tokenizers.media.image import load_image, resize
from weft.tokenizers.media.video import load_video
from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Text, Video

SIDE, BANDS, FRAMES, RATE_HZ = 16, 24, 24, 8000
EXTRACTOR = f"grey pixels at {SIDE} x {SIDE}; log-mel, {BANDS} bands x {FRAMES} stretched frames at {RATE_HZ} Hz"
"""Stated beside every Frechet distance and every specialist."""


def log_mel(segment: Audio) -> np.ndarray:
    """float64 [n BANDS]: log-mel frames of 32 ms every 10 ms at RATE_HZ."""
    samples = load_audio(segment.samples, segment.rate_hz, RATE_HZ).astype(np.float64)
    size, hop = RATE_HZ * 32 // 1000, RATE_HZ // 100
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, (size // 2, size)), size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + RATE_HZ / 1400), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    at = np.arange(size // 2 + 1) * RATE_HZ / size
    rise = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    return np.asarray(np.log(power @ np.clip(np.minimum(rise, fall), 0, None).T + 1e-8))


def stretched(frames: np.ndarray, count: int) -> np.ndarray:
    """Frames [n F] linearly stretched to [count F]."""
    at = np.linspace(0, len(frames) - 1, count)
    below = np.floor(at).astype(int)
    above, part = np.minimum(below + 1, len(frames) - 1), (at - below)[:, None]
    return np.asarray(frames[below] * (1 - part) + frames[above] * part)


def mel_error_db(made: Audio, true: Audio) -> float:
    """Mean absolute difference of log-mel frames in dB, after stretching the made sound to the true one's length."""
    target = log_mel(true)
    return float(np.abs(stretched(log_mel(made), len(target)) - target).mean() * 10 / np.log(10))


def features(segment: Segment) -> np.ndarray:
    """float64 [F]: pixels, log-mel, frames with their differences, or readings with their spectrum.

    Those of a file are kept: specialists and judges of one run learn from the same training pictures and sounds.
    """
    if isinstance(segment, Image) and isinstance(segment.pixels, Path) and segment.pixels.is_file():
        return _of_file(Image, segment.pixels, None, segment.pixels.stat().st_mtime_ns)
    if isinstance(segment, Audio) and isinstance(segment.samples, Path) and segment.samples.is_file():
        return _of_file(Audio, segment.samples, segment.rate_hz, segment.samples.stat().st_mtime_ns)
    return _measured(segment)


@lru_cache(maxsize=1 << 14)
def _of_file(kind: type[Image] | type[Audio], path: Path, rate_hz: float | None, changed_ns: int) -> np.ndarray:
    found = _measured(Image(path) if kind is Image else Audio(path, rate_hz=rate_hz))
    found.flags.writeable = False
    return found


def _measured(segment: Segment) -> np.ndarray:
    if isinstance(segment, Image):
        return _small(load_image(segment.pixels, 1)).reshape(-1)
    if isinstance(segment, Audio):
        mel = log_mel(segment)
        loud = mel.max(axis=1) > mel.max() - 8  # cut silence at both ends
        mel = mel[np.flatnonzero(loud)[0] : np.flatnonzero(loud)[-1] + 1]
        return np.append((stretched(mel - mel.mean(axis=0), FRAMES)).reshape(-1), 3 * np.log(len(mel)))
    if isinstance(segment, Video):
        frames = load_video(segment.frames, 1)[0]
        few = np.stack([_small(f) for f in frames[np.linspace(0, len(frames) - 1, 6).round().astype(int)]])
        return np.concatenate([few.reshape(-1), np.diff(few, axis=0).reshape(-1)])
    if isinstance(segment, Sensor | Action):
        values = np.nan_to_num(np.asarray(segment.values, np.float64)).reshape(len(np.asarray(segment.values)), -1)
        level = np.stack([values.mean(0), values.std(0), np.abs(values).max(0)]).reshape(-1)
        waves = np.abs(np.fft.rfft(values - values.mean(0), axis=0)) / len(values)
        return np.concatenate([level, stretched(waves, 32).reshape(-1)])
    assert isinstance(segment, Text)
    return _trigrams(segment.text)


def _small(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(resize(pixels, SIDE, SIDE)[..., 0], np.float64)


def _trigrams(text: str, size: int = 256) -> np.ndarray:
    """Hashed byte trigrams; the hash is FNV-1a, the same in every process."""
    out = np.zeros(size)
    data = f"  {text.lower()}  ".encode()
    for i in range(len(data) - 2):
        value = 2166136261
        for byte in data[i : i + 3]:
            value = (value ^ byte) * 16777619 & 0xFFFFFFFF
        out[value % size] += 1
    return out / max(float(np.linalg.norm(out)), 1e-9)


def forecast_scores(samples: np.ndarray, truth: np.ndarray, history: np.ndarray) -> dict[str, float | list[float]]:
    """Scores of a sampled forecast [s n C] against the future [n C], with the past [m C] as scale."""
    median = np.median(samples, axis=0)
    low, high = np.quantile(samples, [0.05, 0.95], axis=0)
    last = np.broadcast_to(history[-1:], truth.shape)
    return {
        "mase": mase(median, truth, history),
        "crps": crps(samples, truth),
        "over_persistence": [float(np.abs(median - truth).mean()), float(np.abs(last - truth).mean())],
        "coverage_90": coverage(low, high, truth),
    }
