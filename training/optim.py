"""AdamW and Muon over one model: parameters in, parameter groups and an optimizer out.

With Muon, every hidden matrix (and every expert's matrix inside a 3-D weight) goes to Muon and the rest to AdamW. A group
carries `peak` (its full learning rate); the loop writes `lr = peak * schedule` before each update. State is named per
parameter so that it can be saved without pickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.kernels.hardware import multiplies_bfloat16
from weft.model.init import param_groups
from weft.training.distributed import World, gather_flat


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and how hard it pulls."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: float | None = None
    """Peak learning rate of Muon's matrices; None = `lr` (Moonshot's RMS match, arXiv 2502.16982, lets Muon reuse it)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    """Muon's momentum."""
    clip: float = 1.0
    """Largest global gradient norm over all parameters, experts included; 0 = off."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum:g}")
        for name in ("weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name):g}")


def orthogonalise(update: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz towards U V^T for every matrix of [..., rows, columns], in bfloat16 as `torch.optim.Muon` where the
    hardware multiplies it; elsewhere in float32, which is several times faster than emulation.

    Keller Jordan's Muon (kellerjordan.github.io/posts/muon). A batch of matrices is one batched product, so E experts cost
    one call and each is orthogonalised alone.
    """
    tall = update.size(-2) > update.size(-1)
    x = update.bfloat16() if multiplies_bfloat16(update.device) else update.float()
    x = x.mT if tall else x
    shape = x.shape
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)).reshape(-1, *shape[-2:])
    for _ in range(steps):  # x <- 3.4445 x + (-4.7750 G + 2.0315 G G) x with G = x x^T
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    x = x.view(shape)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights and stacks of them [E, rows, columns]; 2-D steps agree with `torch.optim.Muon` (match_rms_adamw).

    `ranks`: processes that hold the same weights and gradients. They divide the orthogonalisation, whose cost does not depend
    on the batch, and exchange its results: every rank writes the same bits.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.1, momentum: float = 0.95, ranks: World | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.ranks = ranks or World()
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices or stacks of matrices, got shape {tuple(p.shape)}; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        directions = [self._direction(p, group["momentum"]) for p, group in work]
        for (p, group), step in zip(work, self._orthogonal(directions)):
            scale = 0.2 * math.sqrt(max(p.size(-2), p.size(-1)))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step.to(p.dtype), alpha=-group["lr"] * scale)
        return loss

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov's look ahead along the mean gradient."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)

    def _orthogonal(self, directions: list[Tensor]) -> list[Tensor]:
        """Each direction made orthogonal, by the rank that it falls to."""
        if self.ranks.size == 1:
            return [orthogonalise(direction) for direction in directions]
        owner = divide([d.numel() * min(d.shape[-2:]) for d in directions], self.ranks.size)
        sizes = [sum(d.numel() for d, r in zip(directions, owner) if r == rank) for rank in range(self.ranks.size)]
        mine = [orthogonalise(d).float().flatten() for d, rank in zip(directions, owner) if rank == self.ranks.rank]
        everyone = gather_flat(torch.cat(mine) if mine else torch.zeros(0, device=directions[0].device), sizes)
        parts = [
            iter(flat.split([d.numel() for d, r in zip(directions, owner) if r == rank])) for rank, flat in enumerate(everyone)
        ]
        return [next(parts[rank]).view_as(d) for d, rank in zip(directions, owner)]


def divide(costs: Sequence[int], ranks: int) -> list[int]:
    """Which rank takes which item: the most expensive first, each to the rank with the least so far. The same everywhere."""
    load, owner = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[i] = load.index(min(load))
        load[owner[i]] += costs[i]
    return owner


class Joined(torch.optim.Optimizer):
    """Several optimizers as one object, for an engine that takes one; groups are shared with the parts."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss


class Optimizers:
    """AdamW and, perhaps, Muon behind one face. State tensors are named `exp_avg.<parameter>` and so on."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: dict[int, str]) -> None:
        self.parts = parts
        self.names = names

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def set_factor(self, factor: float) -> float:
        """Write `peak * factor` to every group; returns the first group's learning rate."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor
        return float(self.param_groups[0]["lr"])

    def step(self) -> None:
        """Apply every part."""
        for part in self.parts:
            part.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor under its own name; scalars such as Adam's step are 0-D tensors."""
        out: dict[str, Tensor] = {}
        for part in self.parts:
            for p, state in part.state.items():
                for key, value in state.items():
                    out[f"{key}.{self.names[id(p)]}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
        return out

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. A parameter without entries starts fresh."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            key, _, name = full.partition(".")
            by_name.setdefault(name, {})[key] = value
        for part in self.parts:
            part.state.clear()
            for group in part.param_groups:
                for p in group["params"]:
                    state = by_name.get(self.names[id(p)])
                    if state is not None:
                        part.state[p] = {k: (v.clone() if k == "step" else v.to(p.device, copy=True)) for k, v in state.items()}


def groups(model: nn.Module, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(AdamW groups, Muon groups) of the trainable parameters.

    Learning rates and decay per kind of parameter come from the model (`weft.model.init.param_groups`), so that they transfer
    across widths. Muon takes the hidden matrices and stacks; its update is orthogonal, so width needs no correction there.
    """
    adam, muon = [], []
    for group in param_groups(model, config.lr, config.weight_decay):
        params = [p for p in group["params"] if p.requires_grad]
        hidden = config.kind == "muon" and group["name"] == "hidden"
        matrices = [p for p in params if hidden and p.ndim in (2, 3)]
        rest = [p for p in params if not (hidden and p.ndim in (2, 3))]
        if rest:
            adam.append({**group, "params": rest, "peak": group["lr"]})
        if matrices:
            peak = config.muon_lr or config.lr
            muon.append({"params": matrices, "lr": peak, "peak": peak, "name": group["name"]})
    return adam, muon


def set_apart(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Give DeepSpeed's expert parameters (marked by `allreduce = False`) groups of their own, named after their ranks."""
    out = []
    for group in found:
        common = [p for p in group["params"] if getattr(p, "allreduce", True)]
        experts = [p for p in group["params"] if not getattr(p, "allreduce", True)]
        out += [{**group, "params": common}] if common else []
        out += [{**group, "params": experts, "moe": True, "name": name}] if experts else []
    return out


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, experts: str | None = None, ranks: World | None = None
) -> Optimizers:
    """AdamW (fused: one pass over memory) and Muon over the trainable parameters of `model`. `experts`: see `set_apart`;
    `ranks`: see `Muon`."""
    adam, muon = groups(model, config)
    if experts is not None:
        adam, muon = set_apart(adam, experts), set_apart(muon, experts)
    if not adam and not muon:
        raise ValueError("every parameter is frozen, so there is nothing to train; unfreeze something in finetune")
    parts: list[torch.optim.Optimizer] = []
    if adam:
        parts.append(torch.optim.AdamW(adam, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    if muon:
        lr = config.muon_lr or config.lr
        parts.append(Muon(muon, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum, ranks=ranks))
    return Optimizers(parts, {id(p): name for name, p in model.named_parameters()})
