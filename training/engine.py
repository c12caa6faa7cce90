"""What the loop asks of an engine, and the plain-torch engine that answers in one process (or in several equal ones).

totals   = engine.exchange(batches, flags)      counts of the whole step, before anything is computed
outcome  = engine.forward_backward(batches)     summed reports, gradient norm, finite or not: the same on every rank
engine.step(factor)  or  engine.skip()          a real branch: a skipped step touches neither weights nor moments
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training.distributed import World, gather_counts, world
from weft.training.loss import COUNTS, LossConfig, Objective, Totals, count, means, totals
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
    """torch.compile the model; needs a C++ compiler on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """deepspeed: what is divided between ranks: nothing, moments, gradients, weights."""
    offload: bool = False
    """deepspeed, stages 2 and 3: moments (and weights in stage 3) live in CPU memory."""
    bucket: int = 50_000_000
    """deepspeed: numbers per reduction bucket."""
    expert_parallel: int = 1
    """Groups of ranks that divide the experts between them; 1 = every rank holds all."""
    threads: int | None = None
    """Intra-op CPU threads; None = torch's choice."""
    timeout_s: float = 600.0
    """How long a rank waits for the others before it fails; longer than the longest evaluation."""

    def __post_init__(self) -> None:
        if self.expert_parallel != 1:
            raise ValueError(
                f"expert_parallel={self.expert_parallel} is not offered: DeepSpeed's AutoEP replaces the expert layer and so "
                "the selection bias, the shared expert and the load count per modality; set it to 1 and use zero_stage 3, "
                "which divides every expert's weights over the ranks"
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


@dataclass(frozen=True)
class Exchange:
    """What ranks tell each other before a step."""

    whole: list[Totals]
    flags: list[float]
    """Element-wise maximum over ranks of the flags that each handed in."""


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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            moved[item.name] = value.to(device, non_blocking=True)
        elif isinstance(value, dict):
            moved[item.name] = {key: inner.to(device, non_blocking=True) for key, inner in value.items()}
    return replace(batch, **moved)


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU if there is one, else the CPU."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"engine.device is {name} but torch sees no GPU; use device: cpu or install a CUDA build of torch")
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
    return Exchange(totals(rows[:, :split].view(me.size, len(batches), COUNTS)), rows[:, split:].amax(0).tolist())


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

    def outcome(self, whole: Totals, config: LossConfig, grad_norm: float) -> Outcome:
        """One message to all ranks: reports, loads, growth, and whether anything anywhere is not finite."""
        assert self.report is not None and self.load is not None and self.growth is not None
        parts = [self.report, self.load.flatten().double(), self.growth, torch.tensor([grad_norm], device=self.report.device)]
        rows = gather_counts(torch.cat([part.double() for part in parts]).cpu())
        report, load, growth, norm = rows.split([part.numel() for part in parts], dim=1)
        finite = bool(torch.isfinite(report).all()) and bool(torch.isfinite(norm).all())
        metrics = means(report.sum(0), whole, config, world=len(rows))
        return Outcome(metrics, load.sum(0).view(self.load.shape).long(), growth.amax(0), float(norm[0]), finite)


class LocalEngine:
    """Plain torch. Under a launcher every rank holds everything and gradients are summed: the reference for the rest."""

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
        self.model = model.to(self.device)
        self.config = engine
        self.clip = optimizer.clip
        self.objective = Objective(self.model, loss, engine.recompute)
        self.run = torch.compile(self.objective) if engine.compile else self.objective
        self.optimizers = build_optimizers(self.model, optimizer)
        self.trainable = [p for group in self.optimizers.param_groups for p in group["params"]]
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
                loss, *numbers = self.run(to_device(batch, self.device), share)
            loss.backward()
            tally.add(*numbers)
        self._sum_gradients()
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        return tally.outcome(whole[0], self.objective.config, float(self._norm))

    def _sum_gradients(self) -> None:
        if self.world.size == 1:
            return
        import torch.distributed as dist

        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.trainable])
        dist.all_reduce(flat)
        for p, part in zip(self.trainable, flat.split([p.numel() for p in self.trainable])):
            p.grad = part.view_as(p).clone()

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
        """Full weights and buffers by name, not copied."""
        return state_weights(self.model)

    def moments(self) -> dict[str, Tensor]:
        """Full optimizer state by name, not copied."""
        return self.optimizers.state_tensors()

    def counters(self) -> dict[str, int]:
        """Whole numbers that belong to the moments: none here, Adam's step is among the tensors."""
        return {}

    def load(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor] | None, counters: dict[str, int] | None = None
    ) -> None:
        """Put weights (and moments) back."""
        self.model.load_state_dict(weights)
        if moments is not None:
            self.optimizers.load_state_tensors(moments)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses over held-out micro-batches, without gradients."""
        self.model.eval()
        whole = self.exchange(list(batches), []).whole
        report = None
        for batch, share in zip(batches, whole):
            with self.autocast():
                _, numbers, *_ = self.objective(to_device(batch, self.device), share)
            report = numbers if report is None else report + numbers
        self.model.train()
        assert report is not None
        return means(gather_counts(report.cpu()).sum(0), whole[0], self.objective.config, self.world.size)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Transformer | None]:
        """The model with whole weights, for probes and callbacks."""
        yield self.model
