# mypy: ignore-errors
"""A Triton program that writes past its tensor, to show that the memory checker sees it."""

import triton
import triton.language as tl


@triton.jit
def overrun(x, SIZE: tl.constexpr):
    """Stores SIZE values whatever the length of x."""
    tl.store(x + (1 << 20) + tl.arange(0, SIZE), 1.0)
