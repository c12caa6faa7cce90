"""FlashAttention-4 (package flash-attn-4, CuTe DSL) with our interval mask: the strongest rival on Hopper.

In: q [T H K], k and v [T G K], a layout. The mask is the interval test on two int32 per key, with block lists made from the
intervals; documents, window, landmarks and two-way blocks are all in it. `python -m weft.benchmarks.speed.gpu_fa4 FOLDER`
compiles its Hopper kernels ahead of time, on a machine without a GPU too; the benchmark then loads them from that folder:
    FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=FOLDER weft kernels bench
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout

TILE = 128  # the block size of its sparse lists on Hopper


def missing() -> str | None:
    """None if the package is there, else what to say."""
    try:
        importlib.metadata.version("flash-attn-4")
        importlib.import_module("flash_attn.cute.interface")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install --pre flash-attn-4)"
    except ImportError as error:
        return f"flash-attn-4 is there but does not import: {error}"
    return None


@functools.cache
def interval_mask() -> Any:
    """born[key] <= query < dies[key], as a mask of the CuTe DSL; aux tensors are born and dies, int32 [1 T]."""
    import cutlass.cute as cute
    import flash_attn.cute.utils as utils
    from cutlass import Int32

    @cute.jit
    def mask(batch, head, query, key, lengths, aux):  # type: ignore[no-untyped-def]
        born = utils.scalar_to_ssa(aux[0][batch[0], key[0]], Int32)
        dies = utils.scalar_to_ssa(aux[1][batch[0], key[0]], Int32)
        return (born <= query) & (query < dies)

    return mask


def call(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> Callable[[], Tensor]:
    """Attention as a function of nothing, differentiable in q, k, v."""
    from flash_attn.cute.interface import flash_attn_func

    aux = [layout.born[None].contiguous(), layout.dies[None].contiguous()]
    mask = layout.to_block_mask(TILE)
    forward = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    backward = (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    lists = {"block_sparse_tensors": _lists(forward), "block_sparse_tensors_bwd": _lists(backward)}

    def run() -> Tensor:
        batch = (x[None] for x in (q, k, v))
        out = flash_attn_func(*batch, mask_mod=interval_mask(), aux_tensors=aux, **lists)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return run


def _lists(four: Sequence[Tensor | None]) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(*(None if x is None else x.int().contiguous() for x in four), block_size=(TILE, TILE))


def compile_ahead(length: int, width: int, heads: int = 16, kv_heads: int = 4) -> float:
    """Seconds to compile forward and backward for Hopper under fake tensors; what they compile goes to the cache folder."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    from torch._subclasses.fake_tensor import FakeTensorMode

    begin = time.perf_counter()
    with FakeTensorMode():
        sizes = (heads, kv_heads, kv_heads)
        q, k, v = (torch.empty(1, length, n, width, device="cuda", dtype=torch.bfloat16) for n in sizes)
        aux = [torch.empty(1, length, device="cuda", dtype=torch.int32) for _ in range(2)]
        tiles = -(-length // TILE)
        shapes = ((1, 1, tiles), (1, 1, tiles, tiles)) * 2
        lists = _lists([torch.empty(shape, device="cuda", dtype=torch.int32) for shape in shapes])
        common = {"mask_mod": interval_mask(), "aux_tensors": aux, "block_sparse_tensors": lists}
        out = _flash_attn_fwd(q, k, v, return_lse=True, **common)
        _flash_attn_bwd(q, k, v, out[0], torch.empty_like(out[0]), out[1], **common)
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the kernels of the table into FOLDER."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        print("usage: python -m weft.benchmarks.speed.gpu_fa4 FOLDER")
        return 2
    wanted = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132",
              "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": arguments[0]}  # fmt: skip
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})  # read when it is imported
    reason = missing()
    if reason:
        print(f"FlashAttention-4: {reason}")
        return 1
    for width in (64, 128):
        print(f"head width {width}: forward and backward for sm_90 in {compile_ahead(8192, width):.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
