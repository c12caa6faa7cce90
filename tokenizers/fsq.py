"""Finite scalar quantisation: a vector of D numbers -> one of prod(levels) codes, without a learnt codebook.

Each number is squashed to its own few levels and rounded; the code is the mixed-radix number of the level indices
(Mentzer et al. 2023, arXiv 2309.15505, section 3). No auxiliary loss, and no codebook that could collapse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from weft.tokenizers.files import TokenizerError


@dataclass(frozen=True)
class FSQ:
    """The grid of codes: `levels[i]` values in dimension i."""

    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not self.levels or any(not isinstance(n, int) or not 2 <= n <= 4096 for n in self.levels):
            raise TokenizerError(f"FSQ levels {self.levels} must be one or more integers from 2 to 4096")
        if prod(self.levels) > 1 << 24:
            raise TokenizerError(f"FSQ levels {self.levels} give {prod(self.levels)} codes, at most 2^24 are allowed")

    @property
    def size(self) -> int:
        """Number of codes."""
        return prod(self.levels)

    @cached_property
    def _constants(self) -> tuple[np.ndarray, ...]:
        level = np.array(self.levels, np.float64)
        half = (level - 1) * (1 + 1e-3) / 2  # a little wider, so that the outer levels can be reached
        offset = np.where(level % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        centre = level // 2
        step = np.cumprod(np.concatenate([[1.0], level[:-1]]))
        return half, offset, shift, centre, step

    def round(self, z: Tensor) -> Tensor:
        """float [... D] -> the same shape on the grid, scaled to about [-1, 1]; gradients pass straight through."""
        half, offset, shift, centre, _ = (torch.as_tensor(c, dtype=z.dtype, device=z.device) for c in self._constants)
        bounded = torch.tanh(z + shift) * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / centre

    def codes(self, z: np.ndarray) -> np.ndarray:
        """float [... D] before rounding -> int64 [...] codes."""
        half, offset, shift, centre, step = self._constants
        index = np.rint(np.tanh(z + shift) * half - offset) + centre
        return (index @ step).astype(np.int64)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """int64 [...] codes -> float32 [... D]: the grid points that `round` returns for them."""
        centre, step = self._constants[3:]
        index = (np.asarray(codes)[..., None] // step.astype(np.int64)) % np.array(self.levels)
        return ((index - centre) / centre).astype(np.float32)
