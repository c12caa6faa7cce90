"""A model in every respect but the one that a subclass changes: how a step of single tokens is taken."""

from __future__ import annotations

from typing import Any, Self


class Around:
    """Holds a `Transformer` as `inner`; what a subclass does not define is the model's own."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.inner(*args, **keywords)

    def eval(self) -> Self:
        """Itself: the model is in evaluation mode already."""
        self.inner.eval()
        return self
