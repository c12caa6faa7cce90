"""An exponential moving average of the weights: what `final/` holds when it is switched on (BAGEL and Show-o use 0.9999)."""

from __future__ import annotations

import torch
from torch import Tensor


class Ema:
    """float32 averages by name. `decay` grows from 0 as (1 + n) / (10 + n) so that a short run is not left at its start."""

    def __init__(self, weights: dict[str, Tensor], decay: float, updates: int = 0) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema must lie in (0, 1), got {decay}")
        self.decay = decay
        self.updates = updates
        self.average = {name: w.detach().float().clone() for name, w in weights.items()}

    def restore(self, average: dict[str, Tensor], updates: int) -> None:
        """Put back what a checkpoint holds, each tensor where the one that it replaces lies. A rank that holds only some of
        the weights keeps only those."""
        self.average = {name: average[name].to(old.device) for name, old in self.average.items()}
        self.updates = updates

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]) -> None:
        """Move towards `weights` after an applied update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            [self.average[name] for name in weights], [w.detach().float() for w in weights.values()], 1 - decay
        )
        self.updates += 1
