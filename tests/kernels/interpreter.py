"""Triton's interpreter without its largest cost: it patches the language's modules again at every call of a helper function.

Only processes that tests start for it import this (TRITON_INTERPRET=1 must be set before Triton is imported).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """A helper's modules are patched at its first call within a launch; 3 ms less for each later one."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def first_time(fn: Callable[..., Any]) -> Any:
        if id(fn) in done:
            return None
        done.add(id(fn))
        return patch(fn)

    def fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = first_time
    interpreter.GridExecutor.__call__ = fresh
