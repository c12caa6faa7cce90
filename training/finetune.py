"""Training only a part: frozen parameters by pattern, and low-rank adapters (LoRA, arXiv 2106.09685) on any matrix.

In: a model and a `FinetuneConfig`. Out: the same model with `requires_grad` set and, where asked, weights replaced by
W + (alpha / r) B A. A 3-D expert weight [E rows columns] gets one pair (A, B) per expert. The adapters are torch
parametrizations, so the model's code reads `module.weight` as before; `merged` gives back plain weights for inference.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class FinetuneConfig:
    """What is trained. Patterns are shell-style, on names as `model.named_parameters()` gives them."""

    freeze: tuple[str, ...] = ()
    """Parameters that keep their values, for example ("embedding.*", "blocks.0.*")."""
    train: tuple[str, ...] = ()
    """Exceptions from `freeze`."""
    lora: tuple[str, ...] = ()
    """Matrices that get adapters, for example ("blocks.*.attention.*.weight", "blocks.*.experts.*"); all else is frozen."""
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha:g}")


class LoRA(nn.Module):
    """W -> W + (alpha / r) B A for W [rows columns] or [E rows columns]; B starts at zero, so training starts at W."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scale = alpha / rank
        down = torch.empty(*stack, rank, columns).normal_(0.0, 1 / math.sqrt(columns), generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(*stack, rows, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.scale * (self.up @ self.down)


def apply(model: nn.Module, config: FinetuneConfig, seed: int = 0) -> list[str]:
    """Freeze and adapt `model` in place; returns the names of the adapted weights. A pattern that fits nothing raises."""
    names = [name for name, _ in model.named_parameters()]
    for field in ("freeze", "train", "lora"):
        for pattern in getattr(config, field):
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"finetune.{field} pattern {pattern!r} fits no parameter; names look like {names[0]}, {names[-1]}"
                )
    for name, p in model.named_parameters():
        if config.lora or _fits(name, config.freeze):
            p.requires_grad_(_fits(name, config.train))
    adapted = [n for n, p in model.named_parameters() if _fits(n, config.lora) and p.ndim in (2, 3)]
    generator = torch.Generator().manual_seed(seed)
    for name in adapted:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.register_parametrization(module, leaf, LoRA(getattr(module, leaf), config.rank, config.alpha, generator))
    return adapted


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_adapted(model: nn.Module) -> bool:
    """Whether any weight carries an adapter."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


@torch.no_grad()
def merged(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Raw names and tensors of an adapted model -> the plain weights that inference loads. `scale` = alpha / rank."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        head, mark, tail = name.partition("parametrizations.")
        if not mark:
            out[name] = value
            continue
        leaf, _, part = tail.partition(".")
        if part == "original":
            prefix = f"{head}parametrizations.{leaf}.0."
            out[head + leaf] = value + scale * (weights[prefix + "up"] @ weights[prefix + "down"])
    return out
