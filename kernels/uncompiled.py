"""A call that a compiler leaves alone: in a file of its own, because `torch.compiler.disable` imports the compiler, which takes
2 s and is only wanted where one is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), outside of any graph."""
    return function(*arguments)
