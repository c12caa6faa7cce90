"""Learning-rate schedules: a pure function of (update number, total updates).

In: how many updates were applied so far. Out: a factor in [0, 1] that multiplies every group's peak learning rate.
A skipped batch applies no update, so it moves no learning rate either (DeepSpeed #8415 shows what happens otherwise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, then cosine (Loshchilov and Hutter, arXiv 1608.03983) or warm-up-stable-decay (MiniCPM, arXiv 2404.06395)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    """Updates of linear warm-up; at most a tenth of the run is used."""
    decay_share: float = 0.2
    """wsd: the share of the run that decays at its end."""
    floor: float = 0.1
    """Factor at the end of the run."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share must lie in (0, 1], got {self.decay_share}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")


def factor(config: ScheduleConfig, update: int, total: int | None) -> float:
    """Learning-rate factor of update number `update` (from 0) in a run of `total`; None = length not known yet: warm-up,
    then 1."""
    warmup = config.warmup_steps if total is None else min(config.warmup_steps, total // 10)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if total is None or config.kind == "constant":
        return 1.0
    span = total - warmup
    done = min(1.0, (update - warmup) / max(1, span - 1))
    if config.kind == "wsd":
        start = 1 - config.decay_share
        down = 0.0 if done <= start else (done - start) / config.decay_share
        return 1.0 - (1 - config.floor) * down
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * done))
