"""int8 weight-only: every large matrix as 8-bit integers with one scale per output row.

In: a model. Out: the same model, about a quarter of its memory in float32 (half in bfloat16). A matrix is turned back into the
model's type when it is used, so results are those of a model whose weights were rounded: the error per weight is at most
`max |row| / 254`. In bfloat16 on a CPU, PyTorch's own int8 product is used instead. What it costs is in docs/inference.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LEAST = 1 << 12
"""Matrices with fewer numbers stay as they are: biases, norms, the router."""


class Dequantize(nn.Module):
    """The parametrization of a matrix [... rows columns] stored as int8: integers times the row's scale."""

    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.dtype = weight.dtype
        largest = weight.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
        self.register_buffer("scale", (largest / 127.0).to(torch.float32))

    def forward(self, stored: Tensor) -> Tensor:
        """int8 [... rows columns] -> the model's type."""
        return (stored.to(torch.float32) * self.scale).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Round to the nearest step."""
        return (weight.float() / self.scale).round().clamp(-127, 127).to(torch.int8)


def quantize_int8(model: nn.Module) -> list[str]:
    """Replace every float matrix of at least `LEAST` numbers, experts included; the names of what was replaced.

    Routers, embeddings and the output matrix stay exact: a wrong expert costs more than its gate saves, and decoding reads only
    a slice of the output matrix.
    """
    done = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) or name.endswith("gate") or name == "output" or ".parametrizations" in name:
            continue
        for key, value in list(module.named_parameters(recurse=False)):
            if value.dim() >= 2 and value.numel() >= LEAST and value.is_floating_point():
                _store(module, key, value)
                done.append(f"{name}.{key}")
    return done


def _store(module: nn.Module, key: str, value: nn.Parameter) -> None:
    value.requires_grad_(False)
    parametrize.register_parametrization(module, key, Dequantize(value), unsafe=True)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
