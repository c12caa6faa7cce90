"""One channel's numbers <-> [-1, 1] <-> uniform bins.

Three maps, each monotonic and invertible inside the fitted range: linear, mu-law, quantile. A value outside saturates.
A bin is floor((x + 1) / 2 * bins), at most bins - 1, so that +1.0 stays in the last bin; it decodes to its centre, so the
round-trip error in [-1, 1] is at most half a bin, 1 / bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from weft.tokenizers.files import TokenizerError

Method = Literal["quantile", "mu_law", "linear"]
KNOTS = 257
"""Knots of a quantile map: the 0, 1/256, ... 1 quantiles of the fitted values."""
MU = 255.0
"""Of the mu-law, after dividing by the largest fitted magnitude, so that every bin is in use."""


@dataclass(frozen=True)
class Scaling:
    """A channel's fitted map."""

    method: Method
    knots: np.ndarray
    """float64: linear (low, high), mu-law (largest magnitude,), quantile values at equal steps of [-1, 1]."""

    def __post_init__(self) -> None:
        least = {"linear": 2, "mu_law": 1, "quantile": 2}.get(self.method)
        if least is None:
            raise TokenizerError(f"scaling {self.method!r} must be 'quantile', 'mu_law' or 'linear'")
        if len(self.knots) < least or not np.isfinite(self.knots).all() or (np.diff(self.knots) <= 0).any():
            raise TokenizerError(f"{self.method} scaling needs {least} or more finite, increasing knots")
        if self.method == "mu_law" and not self.knots[0] > 0:
            raise TokenizerError("mu-law scaling needs a magnitude above 0")

    def scale(self, values: np.ndarray) -> np.ndarray:
        """float [...] -> float64 in [-1, 1]; infinite values saturate, NaN stays NaN."""
        x = np.asarray(values, np.float64)
        if self.method == "linear":
            low, high = self.knots
            return np.clip((np.clip(x, low, high) - low) / (high - low) * 2 - 1, -1, 1)
        if self.method == "mu_law":
            x = np.clip(x / self.knots[0], -1, 1)
            return np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
        return np.interp(x, self.knots, np.linspace(-1, 1, len(self.knots)))

    def unscale(self, scaled: np.ndarray) -> np.ndarray:
        """float in [-1, 1] -> float64 in the channel's unit."""
        x = np.asarray(scaled, np.float64)
        if self.method == "linear":
            low, high = self.knots
            return (x + 1) / 2 * (high - low) + low
        if self.method == "mu_law":
            return np.sign(x) * np.expm1(np.abs(x) * np.log1p(MU)) / MU * self.knots[0]
        return np.interp(x, np.linspace(-1, 1, len(self.knots)), self.knots)


def to_bins(scaled: np.ndarray, bins: int) -> np.ndarray:
    """float in [-1, 1] -> int64 in [0, bins)."""
    return np.clip(np.floor((scaled + 1) / 2 * bins), 0, bins - 1).astype(np.int64)


def bin_centres(codes: np.ndarray, bins: int) -> np.ndarray:
    """int64 in [0, bins) -> float64 centre of each bin in [-1, 1]."""
    return (np.asarray(codes, np.float64) + 0.5) / bins * 2 - 1


def fit_scaling(values: np.ndarray, method: Method) -> Scaling:
    """The map for one channel's values (NaN and infinite ones are ignored; none left = the interval [-1, 1])."""
    x = np.asarray(values, np.float64).ravel()
    x = x[np.isfinite(x)]
    if method == "mu_law":
        top = float(np.abs(x).max(initial=0.0))
        return Scaling(method, np.array([top if top > 0 else 1.0]))
    low, high = (float(x.min()), float(x.max())) if len(x) else (-1.0, 1.0)
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-9):  # a constant channel: give it room on both sides
        room = max(abs(low) * 1e-3, 1e-3)
        low, high = low - room, high + room
    if method == "linear" or not len(x):
        return Scaling(method, np.array([low, high]))
    knots = np.quantile(x, np.linspace(0, 1, KNOTS))
    # Equal quantiles (a value that occurs often) are spread by a thousandth of the range, so that the map is invertible.
    floor = np.maximum.accumulate(knots + np.linspace(0, 1e-3, KNOTS) * (high - low))
    return Scaling(method, floor)
