"""One small call of a GPU kernel, forward and backward. test_sanitizer.py runs this file under compute-sanitizer.

`python -m tests.kernels.sanitized NAME` prints "done", or "skip REASON" where the kernel cannot run on this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from weft.kernels.attention import attention, why

BROKEN = "writes past its end"


def attend(backend: str) -> str:
    """Both kinds of landmarks, two-way blocks larger than the window, short documents, a length that no tile divides."""
    from tests.kernels.test_attention import LAYOUTS

    for name in ("landmarks", "images larger than the window", "one-token documents"):
        layout = LAYOUTS[name]("cuda")
        for width in (64, 128):
            made = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
            q, k, v = (torch.randn(len(layout), n, width, **made) for n in (4, 2, 2))
            reason = dict(why(q, k, v, layout))[backend]
            if reason != "runs":
                return f"skip {reason}"
            attention(q, k, v, layout, backend=backend).sum().backward()
    return "done"


def loss() -> str:
    """Slices of odd sizes, one of them without tokens."""
    from weft.kernels.sliced_loss import sliced_cross_entropy

    hidden, weight = (torch.randn(n, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (150, 348))
    index = torch.arange(150, device="cuda") % 2 * 2
    target = torch.where(index == 0, 7, 140)
    slices = ((0, 131), (131, 133), (133, 330))
    sliced_cross_entropy(hidden, weight, target, index, slices, backend="triton", z_loss=0.1)[0].sum().backward()
    return "done"


def experts() -> str:
    """Experts without tokens, widths that no tile divides."""
    from tests.kernels.routed import SIZES, inputs
    from weft.kernels.moe import moe_ffn

    for name in ("experts without tokens", "three of seven, more choices than a block"):
        moe_ffn(*inputs(SIZES[name], torch.bfloat16, "cuda"), backend="triton").sum().backward()
    return "done"


def norm() -> str:
    """Rows that no block divides."""
    from weft.kernels import cuda
    from weft.kernels.rotary import rope_table

    q, k = (torch.randn(77, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (5, 3))
    weights = [torch.rand(64, device="cuda", requires_grad=True) for _ in range(2)]
    reason = cuda.supports(q, k, *weights)
    if reason:
        return f"skip {reason}"
    outs = cuda.qk_norm_rope(q, k, *weights, *rope_table(torch.randint(0, 90, (77, 3), device="cuda"), 64))
    sum(x.sum() for x in outs).backward()  # type: ignore[union-attr]
    return "done"


def decode() -> str:
    """Rows before and after the rings wrap, one that is nobody's, several parts."""
    from weft.kernels.cuda_decode import advance, decode_attention, new_step, supports
    from weft.kernels.paged import PagedCache

    cache = PagedCache(3, 1, 0, 2, 64, window=200, max_landmarks=3, max_length=320, device="cuda")
    for row, length in enumerate((0, 40, 300)):
        cache.begin(row, [at % 7 == 0 for at in range(length)])
        cache.reserve(row, length + 9)
    cache.local.pool.normal_()
    step = new_step(cache, 4, 8, parts=3)
    step.rows.copy_(torch.tensor([2, -1, 0, 1]))
    q, k, v = torch.randn(4, 12, 64, device="cuda", dtype=torch.bfloat16).split([8, 2, 2], 1)
    reason = supports(q, k, cache.local)
    if reason:
        return f"skip {reason}"
    weight = torch.ones(64, device="cuda")
    for turn in range(9):
        step.landmark.fill_(turn % 2)
        decode_attention(q, k, v, weight, weight, step, cache.local, 0, implementation="cuda")
        advance(step, cache, implementation="cuda")
    return "done"


def broken() -> str:
    """A program that the memory checker must report."""
    from tests.kernels.overrun import overrun

    overrun[(1,)](torch.zeros(1, device="cuda"), SIZE=1024)
    return "done"


PROGRAMS: dict[str, Callable[[], str]] = {
    "triton attention": lambda: attend("triton"),
    "cuda attention": lambda: attend("cuda"),
    "hopper attention": lambda: attend("hopper"),
    "triton loss": loss,
    "triton experts": experts,
    "cuda norm": norm,
    "cuda decode": decode,
    BROKEN: broken,
}

if __name__ == "__main__":
    said = PROGRAMS[sys.argv[1]]()
    torch.cuda.synchronize()
    print(said)
