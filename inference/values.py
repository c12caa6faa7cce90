"""What counts as a number in a call: Python's and numpy's, never a truth value."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is an integer or a float; NaN and infinity are floats."""
    return is_integer(value) or isinstance(value, float | np.floating)
