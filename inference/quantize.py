"""int8 weight-only: every large matrix as 8-bit integers with one scale per output row.

In: a model. Out: the same model, about a quarter of its memory in float32 (half in bfloat16). A matrix is turned back into the
model's type when it is used, so results are those of a model whose weights were rounded: the error per weight is at most
`max |row| / 254`. It saves memory, not time: what it costs is in docs/inference.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1 << 12
"""Matrices with fewer numbers stay as they are: biases, norms, the router."""


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[... rows columns] -> int8 of the same shape and float32 scales [... rows 1]."""
    scale = weight.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.0
    return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def from_int8(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, to half a step."""
    return (stored.to(torch.float32) * scale).to(dtype)


@torch.no_grad()
def quantize_int8(model: nn.Module) -> list[str]:
    """Store every float matrix of at least `LEAST` numbers in 8 bits, experts included; the names of what was replaced.

    Routers, embeddings and the output matrix stay exact: a wrong expert costs more than its gate saves, and decoding reads only
    a slice of the output matrix.
    """
    done = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) or name.endswith("gate") or name == "output":
            continue
        for key, value in list(module.named_parameters(recurse=False)):
            if value.dim() >= 2 and value.numel() >= LEAST and value.is_floating_point():
                _store(module, key, value)
                done.append(f"{name}.{key}")
    return done


def _store(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace a parameter by two buffers, and its name by a property that turns them back."""
    stored, scale = to_int8(value)
    del module._parameters[key]
    module.register_buffer(f"{key}_int8", stored)
    module.register_buffer(f"{key}_scale", scale)
    module.__class__ = _with_property(_class(module), key, value.dtype)


@cache
def _with_property(kind: Any, key: str, dtype: torch.dtype) -> type:
    def weight(module: Any) -> Tensor:
        return from_int8(getattr(module, f"{key}_int8"), getattr(module, f"{key}_scale"), dtype)

    return type(f"Int8{kind.__name__}", (kind,), {key: property(weight)})


def _class(module: nn.Module) -> Any:
    return type(module)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
