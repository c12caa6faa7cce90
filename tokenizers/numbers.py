"""Numbers as users hand them in (list, numpy, torch, .npy path, the bytes of a .csv) -> float64 [N C]."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.media.errors import MediaError, border

MAX_POINTS = 1_000_000
MAX_CHANNELS = 512
Names = tuple[str, ...] | None
_HEAD = re.compile(r"(.*?)\s*(?:\[(.*)\])?")


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


def csv_table(data: bytes) -> tuple[np.ndarray, Names, Names]:
    """float64 [N C] readings, names and units of the channels of a .csv file in UTF-8, cells between commas.

    A first line such as `x [m],y [m]` gives names and units; it may be missing. An empty cell is a missing reading, NaN.
    Raises ValueError naming the line that is no row of the table."""
    lines = data.decode("utf-8-sig").rstrip().splitlines()
    rows = list(csv.reader(lines))
    heads = rows[0] if rows and not all(map(_is_number, rows[0])) else []
    found = [_HEAD.fullmatch(word.strip()) for word in heads]
    names, units = (tuple(match[i] or "" if match else "" for match in found) for i in (1, 2))
    first = 1 if heads else 0
    if len(rows) <= first:
        raise ValueError("there are no readings")
    values = [_row(row, line, len(rows[-1])) for line, row in enumerate(rows[first:], start=first + 1)]
    return np.array(values), (names if all(names) else None) or None, (units if all(units) else None) or None


def _row(cells: list[str], line: int, count: int) -> list[float]:
    cells = cells or [""]  # a gap of a single channel
    if len(cells) != count:
        raise ValueError(f"line {line} has {len(cells)} cells, the last one {count}")
    try:
        return [float(cell) if cell.strip() else float("nan") for cell in cells]
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True
