"""How much of a split a smaller world keeps."""

from __future__ import annotations


def share(split: str, scale: float) -> float:
    """What a world of `scale` keeps of a split. The test set shrinks by the square root: a small one says little."""
    return scale**0.5 if split == "test" else scale
