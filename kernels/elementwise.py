"""RMSNorm and SwiGLU in plain torch.

In and out: activations of any leading shape. RMSNorm: Zhang & Sennrich 2019. SwiGLU: Shazeer 2020.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight [D], or None for 1. The result has the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up. With `up` left out, `gate` [... 2F] holds both halves, the gate first."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up
