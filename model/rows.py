"""Row operations whose bits do not depend on how many rows come along: what serving and streaming need.

In: rows [N D]. Out: rows, each a function of its own input alone, to the last bit. On a CPU two things break this:
- gemm picks other kernels for 1, 2, 3 or 5 rows, so rows are filled up to a multiple of `block_rows`: the smallest of 4, 8 and
  16 whose multiples are seen to agree here (4 in float32 with MKL on an AMD EPYC, for all of 16 shapes and 48 counts tried);
- elementwise functions such as exp run a vector loop with a scalar tail of other rounding, and where threads cut the work
  there are more tails. Below 32768 elements torch uses one thread, so they run in blocks of rows of at most that size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

MOST_ROWS = 16
GRAIN = 32768  # at::internal::GRAIN_SIZE
VECTORS = 32 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 16
"""Elements of one step of the vector loop in float32: two registers."""
BLOCKS = (4, 8)
PROBES = ((192, 320), (192, 384), (192, 1000), (64, 23), (40, 80), (19, 40), (512, 96))
"""(D, F) of the products by which a block is tried."""


def block_rows(x: Tensor) -> int:
    """The multiple to which rows like those of x are filled up."""
    if x.device.type != "cpu":
        return MOST_ROWS
    threads, lower = torch.get_num_threads(), x.dtype
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
    return max(_measured(dtype, threads) for dtype in {x.dtype, lower})


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> int:
    """The smallest block that passes; tried once for a type and a number of threads, in a few milliseconds."""
    generator = torch.Generator().manual_seed(0)
    outside = _disable_current_modes()  # a FLOP counter or fake tensors around the call are not meant for this
    with outside, torch.inference_mode(), torch.autocast("cpu", enabled=False):
        pairs = [(torch.randn(144, d, generator=generator), torch.randn(f, d, generator=generator)) for d, f in PROBES]
        for block in BLOCKS:
            if all(_agrees(x.to(dtype), weight.to(dtype), block) for x, weight in pairs):
                return block
    return MOST_ROWS


def _agrees(x: Tensor, weight: Tensor, block: int) -> bool:
    """Whether rows 16 ... have the same bits in products of one, two, ... blocks as in the whole."""
    whole = F.linear(x, weight)
    counts = [block * n for n in (1, 2, 3, 5, 7, 8, 11)]
    return all(torch.equal(F.linear(x[16 : 16 + count], weight), whole[16 : 16 + count]) for count in counts)


def pad_rows(x: Tensor, multiple: int | None = None) -> Tensor:
    """[N D] -> [N' D] with zero rows below, N' the next multiple (of `block_rows`, if none is given)."""
    missing = -len(x) % (multiple or block_rows(x))
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N D] @ [F D]^T, rows filled up where no gradient is wanted."""
    if torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return F.linear(pad_rows(x), weight, bias)[: len(x)]


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, together: int = 1) -> Tensor:
    """A `function` of each row of x [N D], N > 0, in blocks that one thread computes alike. `together`: rows after which a
    contiguous vector loop begins anew (1 for a function that reads halves of rows: its loops run within a row)."""
    if x.device.type != "cpu" or x.numel() <= GRAIN or torch.get_num_threads() == 1:
        return function(x)
    rows = max(together, GRAIN // x.shape[1] // together * together, 1)
    return torch.cat([function(part) for part in x.split(rows)])


def stable_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of x [N D]: whole vectors only, so that no row falls into the scalar tail."""
    together = VECTORS // math.gcd(VECTORS, x.shape[1])
    return by_rows(torch.sigmoid, pad_rows(x.contiguous(), together), together)[: len(x)]
