"""Audio sources -> mono float32 samples at one rate.

In: path or bytes (WAV, FLAC, OGG), or array [N] or [N channels] with `rate_hz`; ints over their range (unsigned ones about
its middle), floats in [-1, 1].
Files are read in blocks against a budget of decoded samples. Channels are averaged, and the rate is converted with
torchaudio's windowed sinc, or with scipy's polyphase filter where the two rates share no useful divisor.
"""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.media.errors import MediaError, border, source_name
from weft.tokenizers.media.limits import DEFAULT, Limits, read_bytes

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")
REPAIR = "save it again as WAV, FLAC or OGG"
_BLOCK = 1 << 16


def load_audio(source: Any, rate_hz: float | None, target_hz: int, limits: Limits = DEFAULT) -> np.ndarray:
    """float32 [N] samples at `target_hz`, mono. `rate_hz` belongs to arrays; a file knows its own. Raises `MediaError`."""
    samples, found_hz = read_audio(source, rate_hz, limits)
    with border(source, REPAIR):
        return resample(samples, found_hz, target_hz)


def read_audio(source: Any, rate_hz: float | None, limits: Limits = DEFAULT) -> tuple[np.ndarray, float]:
    """float32 [N] samples, mono, and their own rate in Hz. Raises `MediaError`."""
    name = source_name(source)
    with border(source, REPAIR):
        if isinstance(source, str | Path | bytes | bytearray | memoryview):
            samples, found_hz = _decode(read_bytes(source, limits, name), limits, name)
            if rate_hz is not None and abs(rate_hz - found_hz) > 1e-6 * found_hz:
                raise MediaError(
                    f"{name} is sampled at {found_hz} Hz, the segment says {rate_hz}; leave rate_hz out for a file"
                )
        else:
            samples, found_hz = _from_array(source, rate_hz, limits, name)
        return samples, found_hz


def _decode(data: bytes, limits: Limits, name: str) -> tuple[np.ndarray, float]:
    """Read blocks with soundfile until the end or until the budget is spent."""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as file:
        if file.format not in FORMATS:
            raise MediaError(f"{name} is {file.format}; {REPAIR}")
        if not 1 <= file.channels <= limits.audio_channels:
            raise MediaError(f"{name} has {file.channels} channels, 1 to {limits.audio_channels} are allowed; mix it down")
        if not limits.audio_rate_min_hz <= file.samplerate <= limits.audio_rate_max_hz:
            raise MediaError(
                f"{name} is sampled at {file.samplerate} Hz, {limits.audio_rate_min_hz} to {limits.audio_rate_max_hz} Hz "
                "are allowed; resample it"
            )
        budget = int(limits.audio_seconds * file.samplerate)
        blocks: list[np.ndarray] = []
        total = 0
        while True:
            block = file.read(_BLOCK, dtype="float32", always_2d=True)
            if not len(block):
                break
            total += len(block)
            if total > budget:
                raise MediaError(f"{name} is longer than {limits.audio_seconds:g} s; cut it")
            blocks.append(_mono(block, name))
        return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), float(file.samplerate)


def _from_array(source: Any, rate_hz: float | None, limits: Limits, name: str) -> tuple[np.ndarray, float]:
    if rate_hz is None or not (math.isfinite(rate_hz) and 1 <= rate_hz <= limits.audio_rate_max_hz):
        raise MediaError(f"{name} needs rate_hz, 1 to {limits.audio_rate_max_hz} samples per second, got {rate_hz!r}")
    array = source.detach().cpu().numpy() if hasattr(source, "detach") else np.asarray(source)
    if array.ndim not in (1, 2) or array.dtype.kind not in "uif":
        raise MediaError(f"{name} has shape {array.shape} and dtype {array.dtype}; give numbers [N] or [N channels]")
    if array.ndim == 2 and not 1 <= array.shape[1] <= limits.audio_channels:
        raise MediaError(f"{name} has {array.shape[1]} channels in [N channels], 1 to {limits.audio_channels} are allowed")
    if len(array) > limits.audio_seconds * rate_hz:
        raise MediaError(f"{name} lasts {len(array) / rate_hz:.0f} s, at most {limits.audio_seconds:g} s are allowed; cut it")
    if array.dtype.kind in "ui":
        half = 2.0 ** (8 * array.dtype.itemsize - 1)
        array = (array.astype(np.float64) - (half if array.dtype.kind == "u" else 0)) / half
    return _mono(array[:, None] if array.ndim == 1 else array, name), float(rate_hz)


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    """[N channels] -> float32 [N]; a sample that is not a number is refused, one beyond +-1 is clipped."""
    mixed = samples.mean(axis=1, dtype=np.float64)
    if not np.isfinite(mixed).all():
        raise MediaError(f"{name} has samples that are NaN or infinite; replace them by zeros")
    return np.clip(mixed, -1, 1).astype(np.float32)


def resample(samples: np.ndarray, rate_hz: float, target_hz: int) -> np.ndarray:
    """float32 [N] at `rate_hz` -> float32 [about N * target_hz / rate_hz]."""
    if not len(samples) or rate_hz == target_hz:
        return samples
    ratio = (Fraction(target_hz) / Fraction(rate_hz)).limit_denominator(200_000)
    up, down = ratio.numerator, ratio.denominator
    if max(up, down) <= 1000:  # torchaudio's kernel has up * down entries
        import torch
        from torchaudio.functional import resample as sinc

        with torch.inference_mode():
            return sinc(torch.from_numpy(samples), down, up).numpy().copy()
    from scipy.signal import resample_poly

    return resample_poly(samples.astype(np.float64), up, down).astype(np.float32)
