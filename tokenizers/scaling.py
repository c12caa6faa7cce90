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
HUGE, TINY = 1e150, 1e-18
"""Magnitudes that are told apart when a range is fitted."""
MU = 255.0
"""Of the mu-law, after dividing by the largest fitted magnitude, so that every bin is in use."""


@dataclass(frozen=True)
class Scaling:
    """A channel's fitted map."""

    method: Method
    knots: np.ndarray
    """float64 [K], in the channel's unit: linear (low, high), mu-law (-top, top), quantile K values."""
    levels: np.ndarray
    """float64 [K]: what the knots are scaled to, from -1 to 1."""

    def __post_init__(self) -> None:
        if self.method not in ("quantile", "mu_law", "linear"):
            raise TokenizerError(f"scaling {self.method!r} must be 'quantile', 'mu_law' or 'linear'")
        for name in ("knots", "levels"):
            values = getattr(self, name)
            if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
                raise TokenizerError(f"{self.method} scaling needs 2 or more finite, increasing {name}")
        if len(self.knots) != len(self.levels) or (self.levels[0], self.levels[-1]) != (-1, 1):
            raise TokenizerError(f"{self.method} scaling needs one level per knot, from -1 to 1")

    def scale(self, values: np.ndarray) -> np.ndarray:
        """float [...] -> float64 in [-1, 1]; infinite values saturate, NaN stays NaN."""
        x = np.asarray(values, np.float64)
        if self.method == "linear":
            low, high = self.knots
            return np.clip((np.clip(x, low, high) - low) / (high - low) * 2 - 1, -1, 1)
        if self.method == "mu_law":
            x = np.clip(x, *self.knots) / self.knots[1]
            return np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
        return np.interp(x, self.knots, self.levels)

    def unscale(self, scaled: np.ndarray) -> np.ndarray:
        """float in [-1, 1] -> float64 in the channel's unit."""
        x = np.asarray(scaled, np.float64)
        if self.method == "linear":
            low, high = self.knots
            return (x + 1) / 2 * (high - low) + low
        if self.method == "mu_law":
            return np.sign(x) * np.expm1(np.abs(x) * np.log1p(MU)) / MU * self.knots[1]
        return np.interp(x, self.levels, self.knots)


def to_bins(scaled: np.ndarray, bins: int) -> np.ndarray:
    """float in [-1, 1] -> int64 in [0, bins)."""
    return np.clip(np.floor((scaled + 1) / 2 * bins), 0, bins - 1).astype(np.int64)


def bin_centres(codes: np.ndarray, bins: int) -> np.ndarray:
    """int64 in [0, bins) -> float64 centre of each bin in [-1, 1]."""
    return (np.asarray(codes, np.float64) + 0.5) / bins * 2 - 1


def fit_scaling(values: np.ndarray, method: Method) -> Scaling:
    """The map for one channel's values (NaN and infinite ones are ignored; none left = the interval [-1, 1])."""
    x = np.asarray(values, np.float64).ravel()
    x = np.clip(x[np.isfinite(x)], -HUGE, HUGE)
    ends = np.array([-1.0, 1.0])
    if method == "mu_law":
        top = float(np.abs(x).max(initial=0.0))
        return Scaling(method, ends * (top if top > TINY else 1.0), ends)
    low, high = (float(x.min()), float(x.max())) if len(x) else (-1.0, 1.0)
    if not high - low > max(1e-9 * max(abs(low), abs(high)), TINY):  # a constant channel: give it room on both sides
        room = max(abs(low) * 1e-3, 1e-3)
        return Scaling(method, np.array([low - room, high + room]), ends)
    if method != "quantile" or not len(x):
        return Scaling(method, np.array([low, high]), ends)
    levels = np.linspace(-1, 1, KNOTS)
    knots = np.quantile(x, (levels + 1) / 2)
    return Scaling(method, *_distinct(knots, levels))


def _distinct(knots: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles without repeats: a value that occurs often gets the middle of its levels, the ends stay at -1 and 1."""
    closest = 1e-12 * np.abs(knots).max()  # thousands of float64 steps, so that the map can be inverted
    group = np.zeros(len(knots), np.int64)
    kept, last = [0], knots[0]
    for i in range(1, len(knots)):
        if knots[i] - last > closest:
            kept.append(i)
            last = knots[i]
        group[i] = len(kept) - 1
    middle = np.bincount(group, levels) / np.bincount(group)
    middle[0], middle[-1] = -1.0, 1.0
    out = knots[kept]
    out[-1] = knots[-1]
    return out, middle
