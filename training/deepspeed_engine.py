"""DeepSpeed behind the engine interface: ZeRO 0 to 3, CPU offload. The only file that imports deepspeed.

What is handled here, because each was seen to go wrong (DeepSpeed 0.19.8, CPU and gloo, 2 processes): - no compiler:
the shared-memory kernel that every CPU start builds (60 s, or death without ninja) is switched off, and AdamW comes
from torch (the config's own builds a C++ one for 188 s); - `gradient_clipping` is always written: its default became
1.0 in June 2026; - no launcher: a one-process world is described to it instead of asking for MPI; - unused modules:
every forward runs every module and expert, maybe on no rows, so ZeRO 1/2 are not silently wrong and 3 not hung; - mean
of nothing: losses arrive divided by counts of the whole step, so DeepSpeed's average over ranks is undone by a factor;
- not finite: the norm is known before the step, and a skipped step leaves by DeepSpeed's own overflow branch on all
ranks; - checkpoints: DeepSpeed's own are bound to a world size and pickled, so state is gathered whole, parameter by
parameter, into the same safetensors that the local engine writes: elastic, and exact in both directions. Every rank
builds the whole model in CPU memory before ZeRO-3 divides it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.model.moe import MoE
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training import expert_parallel
from weft.training.distributed import describe_single_process, gather_counts, launched, world
from weft.training.engine import EngineConfig, Exchange, Outcome, Tally, compile_blocks, exchange, pick_device, plain_copy
from weft.training.expert_parallel import ExpertGroups, is_expert
from weft.training.health import check_agreement
from weft.training.loss import LossConfig, Objective, Totals, means
from weft.training.norms import PartNorms
from weft.training.optim import Joined, OptimizerConfig, build_optimizers
from weft.training.zero_state import ZeroState


def import_deepspeed(device: torch.device) -> Any:
    """The module, quiet and without compiling anything on a CPU."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError("engine.kind is deepspeed, which is not installed; run: pip install 'weft[deepspeed]'")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A build that was killed leaves a lock in the shared folder on which every later start waits (pytorch #189245).
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"weft-extensions-{os.getuid()}"))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed).*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"deepspeed.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = device.type != "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def deepspeed_config(engine: EngineConfig, clip: float, accumulate: int) -> dict[str, Any]:
    """What DeepSpeed is told, every default that has changed over time included."""
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": engine.bucket,
        "allgather_bucket_size": engine.bucket,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if engine.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": engine.bucket, "stage3_max_live_parameters": 10**9}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if engine.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip if engine.zero_stage else 0.0,  # stage 0: clipped here, it cannot clip no gradients
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class DeepSpeedEngine:
    """Same maths as `LocalEngine`, with state (and experts, if they are divided) spread over the ranks."""

    def __init__(
        self, model: Transformer, engine: EngineConfig, optimizer: OptimizerConfig, loss: LossConfig, accumulate: int = 1
    ) -> None:
        if any("parametrizations" in name for name, _ in model.named_parameters()) and engine.zero_stage == 3:
            raise ValueError("adapters (finetune.lora) need whole weights; use engine.zero_stage 0, 1 or 2")
        self.device = pick_device(engine.device)
        self.deepspeed = import_deepspeed(self.device)
        if not launched():
            describe_single_process()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.world = world()
        expert_parallel.check(model.config, engine.expert_parallel, self.world)
        self.stage = engine.zero_stage
        self.config = engine
        self.clip = optimizer.clip
        self._last_norm = 0.0
        shapes = {name: p.shape for name, p in model.named_parameters()}
        self.groups, group_name = self._divide(model)
        self.model = model.to(self.device)
        self.objective = Objective(self.model, loss, engine.recompute)
        if engine.compile:
            compile_blocks(self.model)
        for p in self.model.parameters():
            if p.dim() == 0:  # DeepSpeed broadcasts parameters as bytes, and a 0-D tensor has no such view
                p.data = p.data.reshape(1)
        self.norms = PartNorms(self.model)
        self.optimizers = build_optimizers(self.model, optimizer, experts=group_name)
        if len(self.optimizers.parts) != 1 and self.stage:
            raise ValueError("DeepSpeed divides one optimizer; use engine.zero_stage: 0 or optimizer.kind: adamw")
        if self.stage == 3:
            self.deepspeed.utils.set_z3_leaf_modules(self.objective, [MoE])
        parts = self.optimizers.parts
        self.client = parts[0] if len(parts) == 1 else Joined(parts)
        with self._divided_engine():
            self.engine, *_ = self.deepspeed.initialize(
                model=self.objective,
                optimizer=self.client,
                config=deepspeed_config(engine, optimizer.clip, accumulate),
                dist_init_required=False,
            )
        self.zero = self.engine.optimizer
        self.names = {name: p for name, p in self.model.named_parameters()}
        self.state = ZeroState(
            self.deepspeed, self.stage, self.zero, self.client, self.optimizers, self.model, shapes, self.groups, self.world
        )

    def _divide(self, model: Transformer) -> tuple[ExpertGroups, str | None]:
        """Keep this rank's experts and mark them as DeepSpeed marks its own, in its own groups; (groups, their name)."""
        size = self.config.expert_parallel
        if size == 1:
            return ExpertGroups(), None
        from deepspeed.utils import groups

        self.deepspeed.init_distributed(dist_init_required=False)
        groups._create_expert_and_data_parallel(size)
        name = f"ep_size_{size}"
        parallel, data = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
        for group in (parallel, data):
            dist.set_timeout(timedelta(seconds=self.config.timeout_s), group)
        found = expert_parallel.place(size, self.world, parallel, data)
        expert_parallel.divide(model, found)
        for param_name, p in model.named_parameters():
            if is_expert(param_name):
                marks: Any = p
                marks.allreduce, marks.group_name = False, name
                marks.ds_zero_placement_family, marks.ds_zero_partition_group_name = "autoep_expert", name
        return found, name

    @contextlib.contextmanager
    def _divided_engine(self) -> Iterator[None]:
        """Have `deepspeed.initialize` build an engine that knows of divided experts: it looks for its own layers otherwise."""
        base = self.deepspeed.DeepSpeedEngine

        class Divided(base):  # type: ignore[misc, valid-type]
            def _configure_distributed_model(self, model: Any) -> None:
                super()._configure_distributed_model(model)
                self.has_moe_layers = True

            def _validate_zero3_moe_compatibility(self) -> None:
                """Stage 3 divides each expert over the ranks that hold it, as it does for AutoEP."""

        if self.groups.size > 1:
            self.deepspeed.DeepSpeedEngine = Divided
        try:
            yield
        finally:
            self.deepspeed.DeepSpeedEngine = base

    def exchange(self, batches: list[Batch | None], flags: list[float]) -> Exchange:
        """Counts of the whole step and the agreed flags."""
        return exchange(batches, flags, self.world)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 matmuls where the config asks for them."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def forward_backward(self, batches: list[Batch], whole: list[Totals]) -> Outcome:
        """Gradients of the whole step; DeepSpeed reduces them at the last micro-batch."""
        self.objective.train()
        tally = Tally()
        for k, (batch, share) in enumerate(zip(batches, whole)):
            with self.autocast():
                loss, *numbers = self.engine(batch.to(self.device), share)
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
            tally.add(*numbers)
            if k + 1 < len(batches):
                self.engine.step()  # counts the micro-batch; nothing is updated before the last one
        known = self._norm()
        outcome = tally.outcome(whole[0], self.objective.config, self.norms.squares(self._pieces()), known)
        self._last_norm = outcome.grad_norm
        return outcome

    def _norm(self) -> float | None:
        """Global gradient norm before clipping; infinity where DeepSpeed says -1; None: the root of all squares."""
        if self.stage == 0:
            if self.groups.size > 1:
                return None
            return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self.zero._get_norm_groups()))
        else:
            norm = float(self.zero.scaled_global_norm())
        return norm if norm >= 0 else float("inf")

    def _pieces(self) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        """What this rank answers for, so that every piece of a gradient is counted on one rank only."""
        if self.stage == 0:
            mine = [p for n, p in self.names.items() if (self.groups.root if self.groups.divides(n) else self.world.first)]
            yield from ((p, p.grad) for p in mine if p.grad is not None)
            return
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.params_in_partition
        if self.config.offload:
            norms, key = self.zero.norm_for_param_grads, self.zero.get_param_id
            yield from ((p, norms[key(p)].reshape(1)) for group in groups for p in group if key(p) in norms)
            return
        for i, params in enumerate(groups):
            pieces = [g for g in self.zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            yield from zip(params, pieces)

    def step(self, factor: float) -> float:
        """Clip and update."""
        lr = self.optimizers.set_factor(factor)
        if self.stage == 0 and self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, torch.tensor(self._last_norm))
        self.engine.step()
        if self.stage and self.zero.overflow:
            raise RuntimeError("DeepSpeed skipped a step whose gradients were finite; its state no longer agrees with ours")
        return lr

    def skip(self) -> None:
        """Leave by DeepSpeed's overflow branch: gradients are dropped, weights and moments are not touched."""
        if self.stage == 0:
            self.engine.zero_grad()
            for p in self.model.parameters():
                p.grad = None
            self.engine.step()
            return
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        invalid = torch.tensor(-1.0, device=self.device)
        setattr(self.zero, name, lambda *_: [invalid] if name == "_get_norm_groups" else invalid)
        try:
            self.engine.step()
        finally:
            delattr(self.zero, name)

    def weights(self) -> dict[str, Tensor]:
        """Full weights and buffers on rank 0's CPU; every rank must call it."""
        return self.state.weights()

    def moments(self) -> dict[str, Tensor]:
        """Full optimizer state on rank 0's CPU; every rank must call it."""
        return self.state.moments()

    def counters(self) -> dict[str, int]:
        """Nothing beyond the moments."""
        return {}

    def load(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor] | None, counters: dict[str, int] | None = None
    ) -> None:
        """Put weights (and moments) back, whatever engine and world size wrote them."""
        self.state.load(weights, moments)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses over held-out micro-batches; every rank runs the same number of forwards."""
        self.objective.eval()
        whole = self.exchange(list(batches), []).whole
        report = None
        for batch, share in zip(batches, whole):
            with self.autocast():
                _, numbers, *_ = self.engine(batch.to(self.device), share)
            report = numbers if report is None else report + numbers
        self.objective.train()
        assert report is not None
        return means(gather_counts(report.cpu()).sum(0), whole[0], self.objective.config, self.world.size)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Transformer | None]:
        """A model for probes. Under ZeRO-3 or with divided experts a plain copy on rank 0 and None elsewhere: ranks may then
        run different numbers of forwards, which on the divided model would pair unequal collectives."""
        if self.stage < 3 and self.groups.size == 1:
            yield self.model
            return
        weights = self.weights()
        yield plain_copy(self.model, weights, self.device) if self.world.first else None

    def check_weights(self) -> None:
        """Raise `WeightsDiffer` if ranks hold different bits of what they hold together; under ZeRO-3 those are the buffers."""
        held = dict(self.model.named_buffers()) if self.stage == 3 else dict(self.model.state_dict())
        check_agreement(*self.groups.split(held), self.groups.index)
