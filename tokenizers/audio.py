"""Audio <-> log-mel tokens: `frames_per_token` mel frames each.

In: an `Audio` segment (path, bytes or samples at any rate). Out: `Tokens` with features [n frames_per_token * n_mels],
normalised to about zero mean and unit variance, grid (n,), time of token k = k * frames_per_token * hop / sample rate.
Codes come from an FSQ codec fitted on the user's sound; without one the tokenizer is input only (codes -1). `decode` goes
through mel frames to samples with Griffin-Lim, or with the user's `vocoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers import files
from weft.tokenizers.base import Tokens
from weft.tokenizers.codec import Codec, CodecConfig, encode_all, saved_codec
from weft.tokenizers.codec_fit import CodecFit, CodecReport, Progress, fit_codec, measure
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.media.audio import load_audio
from weft.tokenizers.media.limits import DEFAULT, Limits
from weft.tokenizers.mel import MelConfig
from weft.tokenizers.segment import Audio, Segment

Vocoder = Callable[[np.ndarray, int], np.ndarray]
"""(log-mel frames float32 [T n_mels], sample rate) -> samples float32 [about T * hop] in [-1, 1]."""


@dataclass(frozen=True)
class AudioConfig:
    """The spectrogram and how it is cut into tokens."""

    sample_rate_hz: int = 16_000
    """Every sound is brought to this rate."""
    n_mels: int = 80
    """Mel bands from 0 Hz to half the sample rate."""
    hop: int = 160
    """Samples from frame to frame (10 ms at 16 kHz)."""
    win: int = 400
    """Samples of the Hann window (25 ms at 16 kHz)."""
    frames_per_token: int = 4
    """Mel frames of one token (40 ms at 16 kHz)."""
    mean: float = -7.0
    """Of a log-mel value, subtracted from features; `fit` replaces it by the data's."""
    std: float = 2.5
    """Of a log-mel value; `fit` replaces it by the data's."""

    def __post_init__(self) -> None:
        if not isinstance(self.frames_per_token, int) or not 1 <= self.frames_per_token <= 64:
            raise TokenizerError(f"audio frames_per_token {self.frames_per_token} must be an integer from 1 to 64")
        if not (-100 < self.mean < 100 and 1e-3 <= self.std < 100):
            raise TokenizerError(f"audio mean {self.mean} and std {self.std} must be finite, std at least 0.001")
        _ = self.mel

    @cached_property
    def mel(self) -> MelConfig:
        """The spectrogram's part of this config."""
        return MelConfig(self.sample_rate_hz, self.n_mels, self.hop, self.win)

    @property
    def token_samples(self) -> int:
        """Samples of one token."""
        return self.frames_per_token * self.hop


class AudioTokenizer:
    """Sound to mel tokens and, with a fitted codec, codes to sound."""

    modality = "audio"

    def __init__(
        self,
        config: AudioConfig | None = None,
        codec: Codec | None = None,
        limits: Limits = DEFAULT,
        vocoder: Vocoder | None = None,
    ) -> None:
        self.config, self.codec, self.limits, self.vocoder = config or AudioConfig(), codec, limits, vocoder
        self.feature_size = self.config.frames_per_token * self.config.n_mels
        self.size = codec.size if codec else 0
        if codec and codec.feature_size != self.feature_size:
            raise TokenizerError(f"the codec has {codec.feature_size} features, the audio config needs {self.feature_size}")

    def samples(self, segment: Segment) -> np.ndarray:
        """float32 [N]: mono samples at the config's rate."""
        if not isinstance(segment, Audio):
            raise TokenizerError(f"AudioTokenizer encodes Audio, got {type(segment).__name__}")
        return load_audio(segment.samples, segment.rate_hz, self.config.sample_rate_hz, self.limits)

    def features(self, segment: Segment) -> np.ndarray:
        """float32 [n F]: normalised log-mel frames; a sound shorter than a token, even empty, is one token."""
        samples = self.samples(segment)
        tokens = max(1, -(-len(samples) // self.config.token_samples))
        frames = self.config.mel.frames(samples, tokens * self.config.frames_per_token)
        return ((frames - np.float32(self.config.mean)) / np.float32(self.config.std)).reshape(tokens, -1)

    def encode(self, segment: Segment) -> Tokens:
        """Tokens of an `Audio` segment."""
        return self._tokens([self.features(segment)])[0]

    def encode_many(self, segments: Iterable[Segment]) -> list[Tokens]:
        """Tokens of many sounds, with one call of the codec: the same as `encode` of each."""
        return self._tokens([self.features(s) for s in segments])

    def _tokens(self, features: list[np.ndarray]) -> list[Tokens]:
        return [
            Tokens(codes=c, grid=(len(f),), time=self.times(len(f)), features=f)
            for c, f in zip(encode_all(self.codec, features), features)
        ]

    def times(self, count: int) -> np.ndarray:
        """int64 [count]: ns after the segment's start at which each token begins."""
        step = self.config.token_samples * 1_000_000_000
        return np.arange(count, dtype=np.int64) * step // self.config.sample_rate_hz

    def decode_mel(self, codes: np.ndarray, grid: tuple[int, ...] | None = None) -> np.ndarray:
        """Codes [n] to log-mel frames float32 [n * frames_per_token n_mels]."""
        if self.codec is None:
            raise TokenizerError(
                "this audio tokenizer is input only: it has no codec; call AudioTokenizer.fit(sounds) to generate audio"
            )
        codes = files.checked_codes(codes, self.size, grid or (len(codes),), "audio")
        features = self.codec.decode(codes, (1, len(codes)))
        return features.reshape(-1, self.config.n_mels) * np.float32(self.config.std) + np.float32(self.config.mean)

    def decode(self, codes: np.ndarray, grid: tuple[int, ...] | None = None, **shape: Any) -> Audio:
        """Codes [n] to float32 samples at the config's rate; `samples=N` crops the padding of the last token."""
        frames = self.decode_mel(codes, grid)
        if self.vocoder is not None and len(frames):
            sound = np.clip(np.asarray(self.vocoder(frames, self.config.sample_rate_hz), np.float32).reshape(-1), -1, 1)
        else:
            sound = self.config.mel.samples(frames)
        return Audio(samples=sound[: shape.get("samples")], rate_hz=float(self.config.sample_rate_hz))

    @classmethod
    def fit(
        cls,
        sounds: Iterable[Any],
        config: AudioConfig | None = None,
        codec: CodecConfig | None = None,
        fit: CodecFit | None = None,
        *,
        progress: Progress | None = None,
        limits: Limits = DEFAULT,
        vocoder: Vocoder | None = None,
    ) -> tuple[AudioTokenizer, CodecReport]:
        """A tokenizer whose codec was trained on `sounds` (Audio segments), and how well it does.

        The report's errors are in units of the fitted standard deviation; `mel_error_db` turns them into decibels.
        """
        plain = cls(config, limits=limits)
        raw = [plain.features(s) for s in sounds]
        if not raw:
            raise TokenizerError("AudioTokenizer.fit got no sound; give at least one Audio segment")
        values = np.concatenate([r.ravel() for r in raw])
        mean, std = float(values.mean(dtype=np.float64)), max(float(values.std(dtype=np.float64)), 1e-2)
        old = plain.config
        config = replace(old, mean=round(old.mean + mean * old.std, 6), std=round(old.std * std, 6))
        shift, scale = np.float32((old.mean - config.mean) / config.std), np.float32(old.std / config.std)
        grids = [(r * scale + shift)[None] for r in raw]
        fitted, report = fit_codec(grids, codec or CodecConfig(), fit or CodecFit(), progress)
        return cls(config, fitted, limits, vocoder), report

    def measure(self, sounds: Iterable[Audio]) -> CodecReport:
        """Reconstruction error and code usage on other sounds."""
        if self.codec is None:
            raise TokenizerError("this audio tokenizer has no codec to measure; call AudioTokenizer.fit(sounds)")
        return measure(self.codec, [self.features(s)[None] for s in sounds])

    def mel_error_db(self, report: CodecReport) -> float:
        """Mean absolute error of a mel magnitude in decibels."""
        return report.mae * self.config.std * 20 / float(np.log(10))

    def _state(self) -> tuple[dict[str, Any], files.Arrays]:
        settings: dict[str, Any] = {"modality": self.modality, "config": asdict(self.config)}
        if self.codec:
            settings |= {"codec": asdict(self.codec.config)}
        return settings, self.codec.arrays() if self.codec else {}

    def save(self, folder: Path) -> None:
        """Write settings and, if fitted, the codec. A vocoder is code and is not saved."""
        files.write(folder, *self._state())

    @classmethod
    def load(cls, folder: Path, vocoder: Vocoder | None = None) -> AudioTokenizer:
        """Read what `save` wrote."""
        settings, arrays = files.read(folder, "audio")
        plain = cls(files.config_from(AudioConfig, settings.get("config"), str(folder)))
        return cls(plain.config, saved_codec(settings, arrays, plain.feature_size, str(folder), flat=True), vocoder=vocoder)

    def digest(self) -> str:
        """SHA-256 over the config and the codec."""
        return files.digest(*self._state())
