"""Weight-only quantization by torchao: large matrices as int8, or int4 in groups, turned back inside each product.

In: a model. Out: the same model with smaller matrices; activations keep their type. int8 has one scale per output row (an
error of at most `max |row| / 254` per weight), int4 one scale and offset per group of 32 to 128 inputs. Routers, embeddings
and the output matrix stay exact: a wrong expert costs more than its gate saves, and decoding reads only a slice of the
output matrix.

torchao works on `nn.Linear`, experts are stacked as [E N K]: they are taken apart into one linear layer each, which is also
how decoding reads them. What it saves and costs is measured in docs/inference.md. Needs the extra `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.inference.errors import CheckpointError
from weft.model.moe import Experts
from weft.model.router import Gate

KINDS = ("int8", "int4")
LEAST = 1 << 12
"""Matrices with fewer numbers stay as they are."""
GROUPS = (128, 64, 32)
"""int4 groups of inputs, the largest that divides a matrix's inputs is taken; a matrix that none divides stays as it is."""
TILE = 16
"""int4 kernels need a multiple of this many outputs."""


class Stack(nn.ModuleList):
    """E matrices, each in a linear layer of its own; `stack[e]` is the matrix [N K] of expert e."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        for matrix in weight.detach().unbind(0):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix.clone(), requires_grad=False)
            self.append(linear)

    def __getitem__(self, expert: Any) -> Any:
        return self._modules[str(int(expert))].weight  # type: ignore[union-attr]


class StackedExperts(nn.Module):
    """`Experts` whose matrices are separate."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Stack(experts.gate_up_proj), Stack(experts.down_proj)

    def forward(self, x: Tensor, counts: Tensor, stable: bool = False) -> Tensor:
        """Rows [N D] sorted by expert, counts [E] rows of each -> [N D]."""
        parts = []
        for expert, rows in enumerate(x.split(counts.tolist())):
            gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return torch.cat(parts)


@torch.no_grad()
def quantize_weights(model: nn.Module, kind: str) -> list[str]:
    """Replace every linear layer of at least `LEAST` numbers, experts included; the names of what was replaced.

    Raises `CheckpointError` for an unknown kind or one that does not run here, ModuleNotFoundError without torchao.
    """
    if kind not in KINDS:
        raise CheckpointError(f"quantize={kind!r} is not supported; use None, {' or '.join(map(repr, KINDS))}")
    config = _configs(kind, next(model.parameters()))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Experts):
                setattr(module, name, StackedExperts(child))
    done = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Gate) and name != "output":
            chosen = config(module.weight) if module.weight.numel() >= LEAST else None
            if chosen is not None:
                _apply(module, chosen, name)
                done.append(name)
    return done


def _apply(module: nn.Linear, config: Any, name: str) -> None:
    from torchao.quantization import quantize_

    try:
        quantize_(module, config, filter_fn=lambda layer, _: layer is module)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # torchao's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"torchao cannot quantize {name} [{module.out_features} {module.in_features}] here ({reason}); use quantize='int8'"
        ) from error


def _configs(kind: str, like: Tensor) -> Callable[[Tensor], Any]:
    """From a matrix to torchao's configuration for it, or None where it stays exact."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"quantize={kind!r} needs torchao; pip install 'weft[quantize]'") from None
    if kind == "int8":
        eight = Int8WeightOnlyConfig(set_inductor_config=False)
        return lambda weight: eight
    if like.device.type == "cuda":  # not run: needs a GPU
        if like.dtype != torch.bfloat16:
            raise CheckpointError("int4 on a GPU computes in bfloat16; load with dtype='bfloat16'")
        return lambda weight: _grouped(
            weight,
            lambda n: Int4WeightOnlyConfig(n, set_inductor_config=False, int4_packing_format="tile_packed_to_4d"),
        )
    try:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        raise CheckpointError(f"this torchao has no int4 for a CPU ({error}); use quantize='int8'") from error
    return lambda weight: _grouped(weight, lambda n: PrototypeInt4WeightOnlyConfig(n, set_inductor_config=False))


def _grouped(weight: Tensor, config: Callable[[int], Any]) -> Any:
    group = next((n for n in GROUPS if weight.shape[1] % n == 0), None)
    return None if group is None or weight.shape[0] % TILE else config(group)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, quantized ones as they are stored."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(_bytes(t) for t in tensors.values())


def _bytes(tensor: Any) -> int:
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.numel() * tensor.element_size())
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)
