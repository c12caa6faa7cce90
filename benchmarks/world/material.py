"""Reads a built world back as arrays, for the specialists and the judges.

In: the world's folder, a source, a split. Out: manifest lines, pixels uint8, waveforms float32 in [-1, 1], log-mel frames.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.world.build import WorldError

Line = dict[str, Any]
MELS, HOP_S, WINDOW_S = 24, 0.010, 0.032


def lines(root: str | Path, source: str, split: str) -> list[Line]:
    """Manifest lines of one source and split. Raises `WorldError` where the world has none."""
    path = Path(root) / f"{source}.{split}.jsonl"
    if not path.exists():
        raise WorldError(f"{path} is missing: build the sample world first (`weft sample-world {root}`)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def segment(line: Line, modality: str, rank: int = 0) -> Any:
    """What the rank-th segment of `modality` holds: a path, a text, rows of readings."""
    return [s[modality] for s in line["segments"] if modality in s][rank]


def label(line: Line) -> Any:
    """The right answer that the line's metadata names."""
    return line["metadata"]["label"]


def pixels(root: str | Path, path: str) -> np.ndarray:
    """uint8 [H W] of a grey PNG."""
    from PIL import Image

    with Image.open(Path(root) / path) as picture:
        return np.asarray(picture)


def film(root: str | Path, folder: str) -> np.ndarray:
    """uint8 [N H W] of a folder of frames."""
    return np.stack([pixels(root, f"{folder}/{frame.name}") for frame in sorted((Path(root) / folder).glob("*.png"))])


def wave(root: str | Path, path: str) -> tuple[np.ndarray, int]:
    """float32 samples [N] and their rate in Hz."""
    import soundfile

    samples, rate_hz = soundfile.read(Path(root) / path, dtype="float32")
    return samples, int(rate_hz)


@cache
def mel_filters(size: int, rate_hz: int) -> np.ndarray:
    """Triangles on the mel scale (O'Shaughnessy), 80 Hz to 3.8 kHz: float64 [MELS, size // 2 + 1]."""
    low, high = (2595 * float(np.log10(1 + edge / 700)) for edge in (80.0, 3800.0))
    mel = np.linspace(low, high, MELS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    at = np.arange(size // 2 + 1) * rate_hz / size
    rise = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    return np.clip(np.minimum(rise, fall), 0, None)


def log_mel(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Log-mel frames [N MELS] every 10 ms, each band's mean over the utterance removed; silence at both ends is cut."""
    samples = np.asarray(samples, np.float64).reshape(-1)
    size, hop = round(WINDOW_S * rate_hz), round(HOP_S * rate_hz)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max(initial=1e-9))
    if len(loud):
        samples = samples[loud[0] : loud[-1] + 1]
    samples = np.pad(samples, (size // 2, size // 2 + max(0, 2 * hop - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    mel = power @ mel_filters(size, rate_hz).T
    found = np.log(mel + 1e-6 * mel.max(initial=1e-9) + 1e-12)
    return found - found.mean(axis=0)
