"""Intervals: how sure a figure is. In: per-sample scores. Out: (value, low, high) at 95 %, deterministic for a seed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    scores: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap (Efron 1979) over samples; `scores` [n] or [n k], `statistic` maps a resample to a number (mean)."""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no samples to estimate from; check the task's data and split")
    statistic = statistic or (lambda x: float(x.mean()))
    draws = np.random.default_rng(seed).integers(0, len(values), size=(rounds, len(values)))
    spread = np.array([statistic(values[draw]) for draw in draws])
    low, high = np.quantile(spread, [0.025, 0.975])
    return Estimate(statistic(values), float(low), float(high), len(values))


def t_interval(returns: Sequence[float] | np.ndarray) -> Estimate:
    """Student's t interval of a mean: for a few dozen independent episodes."""
    from scipy import stats

    values = np.asarray(returns, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no episodes to estimate from; at least one must finish")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, mean, mean, 1)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half, len(values))


@dataclass(frozen=True)
class Gap:
    """Best and worst slice of a metadata column and the difference between them, with its bootstrap interval."""

    column: str
    best: Hashable
    worst: Hashable
    gap: Estimate
    slices: dict[str, Estimate]


def slice_gap(
    column: str,
    labels: Sequence[Hashable],
    scores: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> Gap:
    """How far the best and the worst slice are apart; resamples inside each slice. `scores`, `statistic`: as in `bootstrap`."""
    values = np.asarray(scores, dtype=np.float64)
    figure = statistic or (lambda x: float(x.mean()))
    groups = {label: values[[i for i, other in enumerate(labels) if other == label]] for label in sorted(set(labels), key=str)}
    means = {label: figure(group) for label, group in groups.items()}
    best, worst = max(means, key=lambda k: means[k]), min(means, key=lambda k: means[k])
    rng = np.random.default_rng(seed)

    def resampled(group: np.ndarray) -> np.ndarray:
        return np.array([figure(group[draw]) for draw in rng.integers(0, len(group), size=(rounds, len(group)))])

    spread = resampled(groups[best]) - resampled(groups[worst])
    low, high = np.quantile(spread, [0.025, 0.975])
    gap = Estimate(means[best] - means[worst], float(low), float(high), len(values))
    return Gap(column, best, worst, gap, {str(k): bootstrap(g, figure, rounds=rounds, seed=seed) for k, g in groups.items()})
