"""Numbers as users hand them in (list, numpy, torch, .npy path) -> float64 [N C]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.media.errors import MediaError, border

MAX_POINTS = 1_000_000
MAX_CHANNELS = 512


def as_table(values: Any, where: str) -> np.ndarray:
    """float64 [N C] from numbers [N] or [N C]; at most 10^6 readings of 512 channels. NaN and infinities pass."""
    if isinstance(values, str | Path):
        path = Path(values)
        with border(path, "write it with numpy.save, without objects"):
            values = np.load(path, allow_pickle=False)
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    try:
        table = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise MediaError(f"{where}: values are no table ({error}); give [N] or [N channels]") from error
    if table.ndim not in (1, 2) or table.dtype.kind not in "buif":
        raise MediaError(f"{where}: values have shape {table.shape} and dtype {table.dtype}; give numbers [N] or [N channels]")
    table = table[:, None] if table.ndim == 1 else table
    if table.shape[0] > MAX_POINTS or not 1 <= table.shape[1] <= MAX_CHANNELS:
        raise MediaError(
            f"{where}: {table.shape[0]} readings of {table.shape[1]} channels; cut to {MAX_POINTS} x 1..{MAX_CHANNELS}"
        )
    return table.astype(np.float64)
