"""Attention as a compiler leaves it alone: apart, because `torch.compiler.disable` imports the compiler (1.5 s at every start)."""

from __future__ import annotations

import torch

from weft.kernels.attention import run_eager

run = torch.compiler.disable(run_eager)
