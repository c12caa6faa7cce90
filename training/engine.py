"""What the loop asks of an engine, and the plain-torch engine that answers in one process (or in several equal ones).

totals   = engine.exchange(batches, flags)      counts of the whole step, before anything is computed
outcome  = engine.forward_backward(batches)     summed reports, gradient norm, finite or not: the same on every rank
engine.step(factor)  or  engine.skip()          a real branch: a skipped step touches neither weights nor moments
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training import expert_parallel
from weft.training.distributed import World, gather_counts, world
from weft.training.health import check_agreement
from weft.training.loss import COUNTS, LossConfig, Objective, Totals, count, means, totals
from weft.training.norms import PartNorms, named
from weft.training.optim import OptimizerConfig, build_optimizers


@dataclass(frozen=True)
class EngineConfig:
    """Where and how steps are computed."""

    kind: Literal["local", "deepspeed"] = "local"
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast over float32 weights and moments."""
    recompute: bool = False
    """Recompute activations block by block in the backward pass (non-reentrant checkpoint)."""
    compile: bool = False
    """torch.compile every block by itself; needs a C++ compiler on CPU. Not under ZeRO-3, which swaps weights in a block."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """deepspeed: what is divided between ranks: nothing, moments, gradients, weights."""
    offload: bool = False
    """deepspeed, stages 2 and 3: moments (and weights in stage 3) live in CPU memory."""
    bucket: int = 50_000_000
    """deepspeed: numbers per reduction bucket."""
    expert_parallel: int = 1
    """Ranks in a row that divide the routed experts between them (expert_parallel.py); 1 = every rank holds all."""
    threads: int | None = None
    """Intra-op CPU threads; None = torch's choice."""
    timeout_s: float = 600.0
    """How long a rank waits for the others before it fails; longer than the longest evaluation."""

    def __post_init__(self) -> None:
        if self.expert_parallel < 1:
            raise ValueError(f"expert_parallel counts the ranks that divide the experts: 1 or more, got {self.expert_parallel}")
        if self.compile and self.kind == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "compile needs weights that stay in place, which ZeRO-3 swaps; use zero_stage 0 to 2 or no compile"
            )
        if self.offload and (self.kind != "deepspeed" or self.zero_stage < 2):
            raise ValueError("offload needs kind: deepspeed and zero_stage 2 or 3")
        if self.bucket < 1 or self.timeout_s <= 0 or (self.threads is not None and self.threads < 1):
            raise ValueError("bucket, timeout_s and threads must be positive")


@dataclass(frozen=True)
class Outcome:
    """One step before its update, equal on every rank."""

    metrics: dict[str, float]
    load: Tensor
    """int64 [layers M E]: router choices of the whole step."""
    growth: Tensor
    """float64 [1 + layers]: rms of the residual stream, bounds on attention logits; the largest of all ranks."""
    grad_norm: float
    finite: bool
    part_norms: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each of `norms.PARTS` before clipping."""


@dataclass(frozen=True)
class Exchange:
    """What ranks tell each other before a step."""

    whole: list[Totals]
    flags: list[float]
    """Element-wise maximum over ranks of the flags that each handed in."""
    sums: list[float]
    """Their element-wise sum over ranks."""


class Engine(Protocol):
    """One way to compute steps. Every method is called by all ranks, in the same order."""

    model: Transformer
    world: World
    device: torch.device

    def exchange(self, batches: list[Batch | None], flags: list[float]) -> Exchange: ...
    def forward_backward(self, batches: list[Batch], whole: list[Totals]) -> Outcome: ...
    def step(self, factor: float) -> float: ...
    def skip(self) -> None: ...
    def weights(self) -> dict[str, Tensor]: ...
    def moments(self) -> dict[str, Tensor]: ...
    def counters(self) -> dict[str, int]: ...
    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor] | None, counters: dict[str, int] | None) -> None: ...
    def evaluate(self, batches: list[Batch]) -> dict[str, float]: ...
    def gathered(self) -> contextlib.AbstractContextManager[Transformer | None]: ...
    def check_weights(self) -> None: ...


def pick_device(name: str) -> torch.device:
    """`cuda` is this process's GPU, by LOCAL_RANK among those that it sees; `auto` the same if there is one, else the CPU."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        seen = torch.cuda.device_count()  # one where a scheduler hides the others
        name = f"cuda:{0 if seen == 1 else int(os.environ.get('LOCAL_RANK', '0'))}"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known to torch; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"engine.device is {name} but torch sees no GPU; use device: cpu or install a CUDA build of torch")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"engine.device is {name} but torch sees {torch.cuda.device_count()} GPUs; start one rank per GPU")
        torch.cuda.set_device(device)
    return device


def state_weights(model: Transformer) -> dict[str, Tensor]:
    """Parameters and persistent buffers (the router's bias is one) by name, without copies."""
    return dict(model.state_dict())


def exchange(batches: list[Batch | None], flags: list[float], me: World) -> Exchange:
    """Gather counts and flags of all ranks in one small message; None stands for a batch that could not be prepared."""
    none = torch.zeros(COUNTS, dtype=torch.float64)
    counts = torch.stack([none if batch is None else count(batch).cpu() for batch in batches])
    row = torch.cat([counts.flatten(), torch.tensor(flags, dtype=torch.float64)])
    rows = gather_counts(row)
    split = counts.numel()
    said = rows[:, split:]
    return Exchange(totals(rows[:, :split].view(me.size, len(batches), COUNTS)), said.amax(0).tolist(), said.sum(0).tolist())


class Tally:
    """Sums one rank's reports, then everyone's."""

    def __init__(self) -> None:
        self.report: Tensor | None = None
        self.load: Tensor | None = None
        self.growth: Tensor | None = None

    def add(self, report: Tensor, load: Tensor, growth: Tensor) -> None:
        """One micro-batch."""
        self.report = report if self.report is None else self.report + report
        self.load = load if self.load is None else self.load + load
        self.growth = growth if self.growth is None else torch.maximum(self.growth, growth)

    def outcome(self, whole: Totals, config: LossConfig, squares: Tensor, grad_norm: float | None = None) -> Outcome:
        """One message to all ranks: reports, loads, growth, norms, and whether anything anywhere is not finite.

        squares: float64 [PARTS] of the pieces of gradient that this rank alone answers for. grad_norm: the norm over all
        parameters where the engine knows it already, the same on every rank; None = root of the sum of all squares.
        """
        assert self.report is not None and self.load is not None and self.growth is not None
        known = torch.tensor([0.0 if grad_norm is None else grad_norm], dtype=torch.float64)
        parts = [self.report.cpu(), self.load.flatten().double().cpu(), self.growth.cpu(), squares, known]
        rows = gather_counts(torch.cat([part.double() for part in parts]))
        report, load, growth, square, norm = rows.split([part.numel() for part in parts], dim=1)
        finite = bool(torch.isfinite(report).all() and torch.isfinite(norm).all() and torch.isfinite(square).all())
        metrics = means(report.sum(0), whole, config, world=len(rows))
        total = float(norm[0]) if grad_norm is not None else float(square.sum().sqrt())
        load = load.sum(0).view(self.load.shape).long()
        return Outcome(metrics, load, growth.amax(0), total, finite, named(square.sum(0)))


class LocalEngine:
    """Plain torch. Under a launcher every rank holds everything (but the experts, if they are divided) and gradients are
    summed: the reference for the rest."""

    def __init__(
        self,
        model: Transformer,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        world_: World | None = None,
    ) -> None:
        self.world = world_ or world()
        self.device = pick_device(engine.device)
        expert_parallel.check(model.config, engine.expert_parallel, self.world)
        self.groups = expert_parallel.form(engine.expert_parallel, self.world, engine.timeout_s)
        expert_parallel.divide(model, self.groups)
        self.model = model.to(self.device)
        self.config = engine
        self.clip = optimizer.clip
        self.objective = Objective(self.model, loss, engine.recompute)
        if engine.compile:
            compile_blocks(self.model)
        same = World() if engine.expert_parallel > 1 else self.world  # who holds the same weights
        self.optimizers = build_optimizers(self.model, optimizer, ranks=same)
        self.trainable = [p for group in self.optimizers.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self.model.named_parameters()}
        divided = {id(p) for p in self.trainable if self.groups.divides(names[id(p)])}
        self.common = [p for p in self.trainable if id(p) not in divided]
        self.divided = [p for p in self.trainable if id(p) in divided]
        self.norms = PartNorms(self.model)
        self._norm = torch.zeros(())

    def exchange(self, batches: list[Batch | None], flags: list[float]) -> Exchange:
        """Counts of the whole step and the agreed flags."""
        return exchange(batches, flags, self.world)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 matmuls where the config asks for them."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def forward_backward(self, batches: list[Batch], whole: list[Totals]) -> Outcome:
        """Gradients of the whole step, over micro-batches and ranks."""
        self.model.train()
        tally = Tally()
        for batch, share in zip(batches, whole):
            with self.autocast():
                loss, *numbers = self.objective(batch.to(self.device, non_blocking=True), share)
            loss.backward()
            tally.add(*numbers)
        self._sum_gradients()
        outcome = tally.outcome(whole[0], self.objective.config, self._squares(), self._whole_norm())
        if self.divided:
            self._norm = torch.tensor(outcome.grad_norm, device=self.device)
        return outcome

    def _whole_norm(self) -> float | None:
        """The norm over all parameters; None while each rank knows only its own experts'."""
        if self.divided:
            return None
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        return float(self._norm)

    def _squares(self) -> Tensor:
        """What this rank answers for: rank 0 for what all hold, the first group's ranks for their experts."""
        mine = (self.common if self.world.first else []) + (self.divided if self.groups.root else [])
        return self.norms.squares((p, p.grad) for p in mine if p.grad is not None)

    def _sum_gradients(self) -> None:
        if self.world.size == 1:
            return
        sum_gradients(self.common, None)
        if self.divided and self.world.size > self.groups.size:
            sum_gradients(self.divided, self.groups.data)

    def step(self, factor: float) -> float:
        """Clip over all parameters, experts included, and apply one update; returns the learning rate."""
        lr = self.optimizers.set_factor(factor)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.clip, self._norm)
        self.optimizers.step()
        self.skip()
        return lr

    def skip(self) -> None:
        """Drop the gradients."""
        for p in self.trainable:
            p.grad = None

    def weights(self) -> dict[str, Tensor]:
        """Full weights and buffers by name, not copied; divided experts on rank 0 only, and every rank must call it."""
        return self._whole(state_weights(self.model))

    def moments(self) -> dict[str, Tensor]:
        """Full optimizer state by name, not copied; divided experts' as the weights."""
        return self._whole(self.optimizers.state_tensors())

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.groups.whole(name, value) for name, value in tensors.items()}
        return {name: value for name, value in found.items() if value is not None}

    def counters(self) -> dict[str, int]:
        """Whole numbers that belong to the moments: none here, Adam's step is among the tensors."""
        return {}

    def load(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor] | None, counters: dict[str, int] | None = None
    ) -> None:
        """Put weights (and moments) back."""
        self.model.load_state_dict({name: self.groups.own(name, value) for name, value in weights.items()})
        if moments is not None:
            self.optimizers.load_state_tensors({name: self.groups.own(name, value) for name, value in moments.items()})

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses over held-out micro-batches, without gradients."""
        self.model.eval()
        whole = self.exchange(list(batches), []).whole
        report = None
        for batch, share in zip(batches, whole):
            with self.autocast():
                _, numbers, *_ = self.objective(batch.to(self.device, non_blocking=True), share)
            report = numbers if report is None else report + numbers
        self.model.train()
        assert report is not None
        return means(gather_counts(report.cpu()).sum(0), whole[0], self.objective.config, self.world.size)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Transformer | None]:
        """The model with whole weights, for probes and callbacks; with divided experts a copy on rank 0 and None elsewhere."""
        if self.groups.size == 1:
            yield self.model
        else:
            weights = self.weights()
            yield plain_copy(self.model, weights, self.device) if self.world.first else None

    def check_weights(self) -> None:
        """Raise `WeightsDiffer` if ranks hold different bits of what they hold together."""
        check_agreement(*self.groups.split(state_weights(self.model)), self.groups.index)


def sum_gradients(params: list[torch.nn.Parameter], group: Any) -> None:
    """Sum gradients over a process group (None: all ranks) in one message; a missing one counts as zero."""
    import torch.distributed as dist

    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    dist.all_reduce(flat, group=group)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p).clone()


def compile_blocks(model: Transformer, **options: Any) -> None:
    """Compile every block by itself, in place, for any number of tokens; options: of `torch.compile`.

    What lies between blocks reads its shapes from the data, and so do routed experts: how many rows each gets changes with
    every batch. They stay as they are, or every step would meet counts for which there is no program yet.
    """
    for block in model.layers:
        if block.mlp is not None:
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)  # type: ignore[method-assign]
        block.compile(dynamic=True, **options)


def plain_copy(model: Transformer, weights: dict[str, Tensor], device: torch.device) -> Transformer:
    """A model of its own with these whole weights: it may run any number of forwards on one rank alone."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    plain.load_state_dict({name: value.to(device) for name, value in weights.items()}, assign=True)
    return plain
