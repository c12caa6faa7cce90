"""Action spaces: gymnasium's in, ours out, and the check that an action is legal.

In: `ActionSpace`, or a gymnasium `Discrete` or `Box`. Out: `ActionSpace`. An action is checked, never clamped:
an illegal one is refused with the dimension, the value and the range.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.inference.errors import SpaceError
from weft.inference.values import is_integer
from weft.tokenizers.segment import ActionSpace


def as_space(space: Any) -> ActionSpace:
    """`ActionSpace` from ours, from an integer n, or from a gymnasium `Discrete` (from zero) or bounded 1-D `Box`."""
    if isinstance(space, ActionSpace):
        return space
    try:
        return _converted(space)
    except SpaceError:
        raise
    except ValueError as error:  # what ActionSpace refuses
        raise SpaceError(str(error)) from error


def _converted(space: Any) -> ActionSpace:
    if is_integer(space):
        return ActionSpace(n=int(space))
    kind = type(space).__name__
    # By name and attributes: gymnasium and its forks agree on these, and none of them has to be installed.
    if kind == "Discrete" and hasattr(space, "n"):
        if int(getattr(space, "start", 0)) != 0:
            raise SpaceError(f"a Discrete space must start at 0, this one starts at {space.start}; shift the actions")
        return ActionSpace(n=int(space.n))
    if kind == "Box" and hasattr(space, "low") and hasattr(space, "high"):
        low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
        if low.ndim != 1:
            raise SpaceError(f"a Box space must be one-dimensional, this one has shape {low.shape}; flatten it")
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise SpaceError("a Box space needs finite bounds; wrap the environment with bounds or pass an ActionSpace")
        return ActionSpace(low=tuple(map(float, low)), high=tuple(map(float, high)))
    raise SpaceError(f"an action space must be an ActionSpace, an integer n, a Discrete or a Box, got {kind}")


def check_action(value: Any, space: ActionSpace) -> np.ndarray:
    """The action as an array (int64 scalar, or float64 [dims]) if it is legal in `space`, else `SpaceError`."""
    array = np.asarray(value)
    if space.n is not None:
        if array.size != 1 or not np.issubdtype(array.dtype, np.integer):
            raise SpaceError(f"an action of a discrete space is one integer, got {array.tolist()!r}")
        choice = int(array.reshape(-1)[0])
        if not 0 <= choice < space.n:
            raise SpaceError(f"action {choice} is outside the {space.n} choices 0..{space.n - 1} of the space")
        return np.asarray(choice, np.int64)
    assert space.low is not None and space.high is not None
    box = np.asarray(array, np.float64).reshape(-1)
    if len(box) != space.dims:
        raise SpaceError(f"an action of this space has {space.dims} dimensions, got {len(box)}")
    for i, (x, low, high) in enumerate(zip(box, space.low, space.high)):
        if not (np.isfinite(x) and low <= x <= high):
            raise SpaceError(f"action dimension {i} is {x}, outside [{low}, {high}]; it is refused, not clamped")
    return box


def to_env(action: np.ndarray, space: ActionSpace, env_space: Any) -> Any:
    """A checked action in the type and shape that the environment's own space expects."""
    if space.n is not None:
        return int(action)
    dtype, shape = getattr(env_space, "dtype", np.float32), getattr(env_space, "shape", (space.dims,))
    value = np.asarray(action, dtype).reshape(shape)
    # Rounding to float32 may step over a bound by one ulp; the bound itself is the same action.
    return np.minimum(np.maximum(value, env_space.low), env_space.high) if hasattr(env_space, "low") else value
