"""Row operations whose bits do not depend on how many rows come along: what serving and streaming need.

In: rows [N D]. Out: rows, each a function of its own input alone, to the last bit. On a CPU two things break this:
- gemm picks other kernels for 1, 2, 3 or 5 rows (measured with 1 and 2 threads; multiples of 16 agree for all sizes tried),
  so rows are filled up to a multiple of 16;
- elementwise functions such as exp run a vector loop with a scalar tail of other rounding, and where threads cut the work
  there are more tails. Below 32768 elements torch uses one thread, so they run in blocks of rows of at most that size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16
GRAIN = 32768  # at::internal::GRAIN_SIZE
VECTORS = 32  # elements of one step of the vector loop in float32 with AVX-512


def pad_rows(x: Tensor, multiple: int = ROWS) -> Tensor:
    """[N D] -> [N' D] with zero rows below, N' the next multiple."""
    missing = -len(x) % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N D] @ [F D]^T, rows filled up where no gradient is wanted."""
    if torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return F.linear(pad_rows(x), weight, bias)[: len(x)]


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise `function` of each row of x [N D], N > 0 a multiple of 16, in blocks that one thread computes alike."""
    if x.device.type != "cpu" or x.numel() <= GRAIN:
        return function(x)
    rows = max(ROWS, GRAIN // x.shape[1] // ROWS * ROWS)
    return torch.cat([function(part) for part in x.split(rows)])
