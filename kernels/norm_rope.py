"""QK-norm and rotation as the model calls them: plain torch or the CUDA kernel, behind one signature.

`auto` is torch (`fused.py` on a CPU, `rotary.py` elsewhere): the CUDA kernel has not been timed on a GPU yet. It is asked for
by `implementation="cuda"`, `with CHOICE.use("cuda")`, or WEFT_QK_NORM=cuda; where it cannot run, that is an error.

Axes: `T tokens  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels import cuda, fused
from weft.kernels.choice import Choice

CHOICE = Choice("WEFT_QK_NORM", ("torch", "cuda"), auto="torch")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the head width, then rotation. q [T H K], k [T G K], weights [K], cos and sin [T K/2].

    Raises ChoiceError for an unknown implementation and RuntimeError where the one asked for cannot run.
    """
    if CHOICE.pick(implementation) == "cuda":
        return cuda.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    return fused.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)


def norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    cache: Tensor,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope`, with the keys and v [T G K] written to their places in `cache` as well. No gradient.

    slot int64 [T]: token t goes to place slot % PAGE of page slot // PAGE of cache [pages 2 G PAGE K], nowhere where it is -1.
    """
    if CHOICE.pick(implementation) == "cuda":
        turned = cuda.norm_rope(q, q_weight, cos, sin, eps)
        return turned, cuda.norm_rope_store(k, v, k_weight, cos, sin, slot, cache, eps)
    q, k = fused.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    at = torch.where(slot < 0, 0, slot)  # page 0 is nobody's: what is kept nowhere goes there
    cache[at // cache.shape[3], :, :, at % cache.shape[3]] = torch.stack([k, v.to(k.dtype)], 1).to(cache.dtype)
    return q, k
