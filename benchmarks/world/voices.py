"""Speaks sentences with espeak-ng and writes FLAC files: the program that a fresh process runs.

In: JSON lines on standard input, each {"path", "voice", "text", "words_per_minute", "pitch"}. Out: mono FLAC at RATE_HZ.

espeak-ng's breathy voices draw noise from a generator that is seeded with the clock, so the seed is set before every
sentence; and the library keeps state between calls, so all sentences are spoken in one order in one fresh process. Two
runs then write equal bytes. This file imports nothing of ours, so that it runs by its path.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

RATE_HZ = 8000
SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: sound goes to the callback before espeak_Synth returns
WORDS_PER_MINUTE, PITCH = 1, 3  # espeak_PARAMETER
MARGIN_S = 0.01


class Speaker:
    """espeak-ng in this process. Raises ModuleNotFoundError without espeakng-loader, OSError for an unknown voice."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("synthetic speech needs espeak-ng: pip install 'weft[world]'") from error
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate_hz = self.library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if self.rate_hz <= 0:
            raise OSError(f"espeak-ng did not start from {espeakng_loader.get_data_path()}; reinstall espeakng-loader")
        self._parts: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept: the library holds only its address
        self.library.espeak_SetSynthCallback(self._callback)
        self._voice = ""

    def _receive(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, voice: str, text: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """int16 samples at `rate_hz`."""
        self._parts.clear()
        if voice != self._voice and self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise OSError(f"espeak-ng has no voice {voice!r}; its voices are accents like gmw/en-US with a variant like +m3")
        self._voice = voice
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self.library.espeak_SetParameter(WORDS_PER_MINUTE, words_per_minute, 0)
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, 1, None, None)
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.int16)


def finish(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Trim silence, resample to RATE_HZ, set the peak to one half. int16 [N] -> float64 [M]."""
    from scipy.signal import resample_poly

    wave = samples.astype(np.float64) / 32768
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    margin = int(MARGIN_S * rate_hz)
    wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
    common = np.gcd(rate_hz, RATE_HZ)
    wave = resample_poly(wave, RATE_HZ // common, rate_hz // common, window=_low_pass(rate_hz // common, RATE_HZ // common))
    return 0.5 * wave / np.abs(wave).max()


_filters: dict[tuple[int, int], np.ndarray] = {}


def _low_pass(down: int, up: int) -> np.ndarray:
    """Kaiser window FIR below both Nyquist rates, designed once."""
    if (down, up) not in _filters:
        from scipy.signal import firwin

        widest = max(up, down)
        _filters[down, up] = firwin(2 * 10 * widest + 1, 1.0 / widest, window=("kaiser", 5.0))
    return _filters[down, up]


def speak(jobs: Iterable[dict[str, Any]]) -> int:
    """Write every job's file; returns how many."""
    import soundfile

    speaker, count = Speaker(), 0
    for job in jobs:
        samples = speaker.say(job["voice"], job["text"], job["words_per_minute"], job["pitch"])
        if not samples.any():
            raise OSError(f"espeak-ng said nothing for {job['text']!r} in voice {job['voice']!r}")
        path = Path(job["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, finish(samples, speaker.rate_hz), RATE_HZ, format="FLAC", subtype="PCM_16")
        count += 1
    return count


if __name__ == "__main__":
    print(speak(json.loads(line) for line in sys.stdin))
