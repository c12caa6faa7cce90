"""Experts divided between ranks: a row travels to the rank that owns its expert, is multiplied there, and travels back.

    rows [N D] sorted by expert --counts, rows--> rows of my experts from every rank [M D] --sort--> matmul --> back --> [N D]

P ranks in a row share the experts of every routed layer: rank index p owns experts [p * E/P, (p + 1) * E/P). World / P such
groups exist; the ranks with one index in all of them hold the same experts and sum their gradients. Everything else (router,
selection bias, shared expert, load counts) stays as it is on every rank, so nothing of the layer is lost; DeepSpeed's AutoEP
replaces it and drops the bias, the shared expert and the load.

Every rank takes part in every exchange of every layer, also with no rows, and an expert without rows multiplies none: the
order of the messages never depends on the data. Rows are multiplied in the order (expert, sending rank, place), which is the
order of one process that holds all ranks' tokens. Gradients travel by the same exchange backwards: an expert's gradient is the
sum over all its rows of all P ranks.

Axes: `N rows sent  M rows received  D width  E experts  P ranks that divide them  K = E / P experts of one rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from weft.kernels.moe import Dispatch, sort_by_expert
from weft.model.config import ModelConfig
from weft.model.moe import Experts
from weft.model.transformer import Transformer
from weft.training.distributed import World


class ExpertParallelError(ValueError):
    """The experts cannot be divided as asked; the message says what to set."""


@dataclass(frozen=True)
class ExpertGroups:
    """Where this rank stands: `size` ranks divide the experts, and this one is number `index` of them."""

    size: int = 1
    index: int = 0
    parallel: Any = None
    """Process group of the ranks that divide the experts."""
    data: Any = None
    """Process group of the ranks that hold the same experts as this one."""
    root: bool = True
    """Whether rank 0 is in `parallel`, so that this rank's experts are wanted where files are written."""

    def divides(self, name: str) -> bool:
        """Whether a tensor of this name is divided."""
        return self.size > 1 and is_expert(name)

    def own(self, name: str, value: Tensor) -> Tensor:
        """This rank's experts of a whole tensor [E ...]; any other tensor as it is."""
        if not self.divides(name) or value.dim() != 3:
            return value
        mine = value.size(0) // self.size
        return value[self.index * mine : (self.index + 1) * mine]

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """All experts [E ...] on rank 0, None on the other ranks, which must call this too; any other tensor as it is."""
        if not self.divides(name) or part.dim() != 3:
            return part
        if not self.root:
            return None
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.index == 0 else None
        dist.gather(part, parts, dst=0, group=self.parallel)
        return torch.cat(parts) if parts is not None else None

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(tensors that all ranks hold, tensors that only ranks with this index hold)."""
        apart = {name for name in tensors if self.divides(name)}
        return {n: t for n, t in tensors.items() if n not in apart}, {n: tensors[n] for n in apart}


def is_expert(name: str) -> bool:
    """Whether a tensor of this name (weight or moment) belongs to routed experts, so that it is divided."""
    return ".mlp.experts." in name


def check(config: ModelConfig, size: int, world: World) -> None:
    """Raise `ExpertParallelError` if `size` ranks cannot divide this model's experts in this world."""
    if size == 1:
        return
    if world.size % size:
        raise ExpertParallelError(
            f"engine.expert_parallel is {size} but {world.size} process(es) share the run; start a multiple of {size} "
            f"(torchrun --nproc-per-node {size} ...) or set engine.expert_parallel: 1, which continues the same checkpoints"
        )
    if not any(config.is_routed(layer) for layer in range(config.layers)) or config.experts % size:
        raise ExpertParallelError(
            f"engine.expert_parallel is {size} but the model has {config.experts} routed experts; it must divide them evenly"
        )


def form(size: int, world: World, timeout_s: float) -> ExpertGroups:
    """Process groups of `size` ranks in a row; every rank must call it. `check` has passed."""
    if size == 1:
        return ExpertGroups()
    limit = timedelta(seconds=timeout_s)
    parallel = [dist.new_group(list(range(i, i + size)), timeout=limit) for i in range(0, world.size, size)]
    data = [dist.new_group(list(range(i, world.size, size)), timeout=limit) for i in range(size)]
    return place(size, world, parallel[world.rank // size], data[world.rank % size])


def place(size: int, world: World, parallel: Any, data: Any) -> ExpertGroups:
    """This rank's groups, whoever made them, with ranks in a row dividing the experts."""
    return ExpertGroups(size, world.rank % size, parallel, data, world.rank < size)


def divide(model: Transformer, groups: ExpertGroups) -> None:
    """Keep only this rank's experts in every routed layer of `model`, in place. Names and the order of parameters stay."""
    if groups.size == 1:
        return
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise ExpertParallelError("adapters (finetune.lora) need whole weights; set engine.expert_parallel: 1")
    for moe in model.routers():
        moe.experts = DividedExperts(moe.experts, groups)


class DividedExperts(Experts):
    """The weights [K ...] of this rank's experts; takes the rows of all experts and returns them multiplied."""

    def __init__(self, whole: Experts, groups: ExpertGroups) -> None:
        nn.Module.__init__(self)
        self.groups = groups
        for name, p in whole.named_parameters():
            mine = groups.own(f".mlp.experts.{name}", p.detach()).clone()
            self.register_parameter(name, nn.Parameter(mine, requires_grad=p.requires_grad))

    def forward(self, x: Tensor, counts: Tensor, stable: bool = False) -> Tensor:  # type: ignore[override]
        """Rows [N D] sorted by expert, counts [E] rows of each -> [N D]. Every rank of the group calls it."""
        if torch.compiler.is_compiling():
            from weft.kernels import uncompiled

            return uncompiled.call(self._exchange, x, counts, stable)  # type: ignore[no-any-return]
        return self._exchange(x, counts, stable)

    def _exchange(self, x: Tensor, counts: Tensor, stable: bool) -> Tensor:
        groups = self.groups
        counts_PK = counts.view(groups.size, -1)
        theirs_PK = torch.empty_like(counts_PK)  # rows that each rank sends me for each of my experts
        dist.all_to_all_single(theirs_PK, counts_PK.contiguous(), group=groups.parallel)
        send, receive = torch.stack([counts_PK.sum(1), theirs_PK.sum(1)]).tolist()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what the product would do: half of the bytes travel
        got_MD = Travel.apply(x, send, receive, groups.parallel)
        order, place = by_expert(theirs_PK, sum(receive))
        rows_MD = super().forward(Dispatch.apply(got_MD, order, place[:, None]), theirs_PK.sum(0), stable)
        return Travel.apply(Dispatch.apply(rows_MD, place, order[:, None]), receive, send, groups.parallel)


def by_expert(counts_PK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows that came ordered by (rank, expert): the order [M] by (expert, rank), and each row's place in it [M]."""
    ranks, mine = counts_PK.shape
    expert = torch.arange(mine, device=counts_PK.device).repeat(ranks)
    expert = expert.repeat_interleave(counts_PK.flatten(), output_size=rows)
    order, place, _ = sort_by_expert(expert[:, None], mine)
    return order, place.flatten()


class Travel(torch.autograd.Function):
    """All-to-all of rows; the gradient travels the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        """x [sum(send) D], the first send[0] rows to the group's first rank and so on -> [sum(receive) D]."""
        ctx.way = send, receive, group
        return exchange_rows(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.way
        return exchange_rows(grad, receive, send, group), None, None, None


def exchange_rows(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    """One all-to-all of rows [sum(send) D] -> [sum(receive) D]."""
    out = x.new_empty((sum(receive), x.size(1)))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out
