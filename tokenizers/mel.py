"""Samples <-> log-mel frames.

Frame i is centred in samples [i * hop, (i + 1) * hop); a mel value is log(max(1e-5, sum of filter x magnitude)), with
Slaney filters.
Back: non-negative inversion of the filter bank, then Griffin-Lim (Perraudin et al. 2013, momentum 0.99) with a fixed seed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from weft.tokenizers.files import TokenizerError

FLOOR = 1e-5
"""Smallest mel magnitude: silence is log(1e-5) = -11.5."""


@dataclass(frozen=True)
class MelConfig:
    """The spectrogram."""

    sample_rate_hz: int = 16_000
    """Every sound is brought to this rate."""
    n_mels: int = 80
    """Mel bands from 0 Hz to half the sample rate."""
    hop: int = 160
    """Samples from frame to frame."""
    win: int = 400
    """Samples of the Hann window."""

    def __post_init__(self) -> None:
        if not 1_000 <= self.sample_rate_hz <= 192_000:
            raise TokenizerError(f"audio sample_rate_hz {self.sample_rate_hz} must be from 1000 to 192000")
        if not 1 <= self.hop <= self.win <= 1 << 15:
            raise TokenizerError(f"audio needs 1 <= hop <= win <= 32768 samples, got hop {self.hop} and win {self.win}")
        if not 1 <= self.n_mels <= 512:
            raise TokenizerError(f"audio n_mels {self.n_mels} must be from 1 to 512")
        if empty := int((self.filters.amax(0) == 0).sum()):
            raise TokenizerError(
                f"{empty} of {self.n_mels} mel bands hold no frequency of {self.n_fft} points; lower n_mels or raise win"
            )

    @property
    def n_fft(self) -> int:
        """Smallest power of two that holds the window."""
        return 1 << (self.win - 1).bit_length()

    @cached_property
    def filters(self) -> Tensor:
        """float32 [n_fft/2+1 n_mels]."""
        from torchaudio.functional import melscale_fbanks

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty bands, which __post_init__ turns into an error
            high = self.sample_rate_hz / 2
            return melscale_fbanks(self.n_fft // 2 + 1, 0.0, high, self.n_mels, self.sample_rate_hz, "slaney", "slaney")

    @cached_property
    def window(self) -> Tensor:
        """float32 [win] Hann."""
        return torch.hann_window(self.win)

    @torch.inference_mode()
    def frames(self, samples: np.ndarray, count: int) -> np.ndarray:
        """float32 [N] -> float32 [count n_mels] log-mel frames; zeros lie before and after the samples."""
        lead = self.n_fft // 2 - self.hop // 2
        padded = np.zeros((count - 1) * self.hop + self.n_fft, np.float32)
        body = samples[: len(padded) - lead]
        padded[lead : lead + len(body)] = body
        x = torch.from_numpy(padded)
        spectrum = torch.stft(x, self.n_fft, self.hop, self.win, self.window, center=False, return_complex=True)
        return (spectrum.abs().T @ self.filters).clamp(min=FLOOR).log().numpy().copy()

    @torch.inference_mode()
    def samples(self, frames: np.ndarray, iterations: int = 32, seed: int = 0) -> np.ndarray:
        """float32 [T n_mels] log-mel -> float32 [T * hop] samples in [-1, 1]."""
        from torchaudio.functional import griffinlim

        count = len(frames)
        if not count:
            return np.zeros(0, np.float32)
        # Griffin-Lim centres frame i on sample i * hop of its output, whose reflecting border needs more than half a
        # window: so one frame more on each side, and the sound begins hop - hop // 2 samples in.
        total = max(count + 2, self.n_fft // (2 * self.hop) + 3)
        mel = torch.full((total, self.n_mels), float(np.log(FLOOR)))
        mel[1 : count + 1] = torch.from_numpy(np.ascontiguousarray(frames, np.float32)).clamp(float(np.log(FLOOR)), 8.0)
        mel[0], mel[count + 1] = mel[1], mel[count]
        magnitude = self._magnitude((mel.exp() - FLOOR).clamp(min=0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            length = (total - 1) * self.hop
            sound = griffinlim(
                magnitude.T[None], self.window, self.n_fft, self.hop, self.win, 1.0, iterations, 0.99, length, True
            )
        first = self.hop - self.hop // 2
        return sound[0, first : first + count * self.hop].clamp(-1, 1).numpy().copy()

    def _magnitude(self, mel: Tensor, iterations: int = 50) -> Tensor:
        """float [T n_mels] -> float [T n_fft/2+1], all >= 0, with filters @ magnitude close to mel.

        Multiplicative updates (Lee and Seung 2001), started from the clipped pseudo-inverse.
        """
        filters = self.filters
        x = (mel @ torch.linalg.pinv(filters)).clamp(min=1e-6)
        gram, target = filters @ filters.T, mel @ filters.T
        for _ in range(iterations):
            x = x * target / (x @ gram).clamp(min=1e-12)
        return x
