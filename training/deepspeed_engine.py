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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.model.moe import MoE
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training.distributed import describe_single_process, gather_counts, launched, world
from weft.training.engine import EngineConfig, Exchange, Outcome, Tally, exchange, pick_device
from weft.training.loss import LossConfig, Objective, Totals, means
from weft.training.optim import OptimizerConfig, build_optimizers

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """Same maths as `LocalEngine`, with state divided over the ranks."""

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
        self.stage = engine.zero_stage
        self.config = engine
        self.clip = optimizer.clip
        self._last_norm = 0.0
        self.model = model.to(self.device)
        self.objective = Objective(self.model, loss, engine.recompute)
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for p in self.model.parameters():
            if p.dim() == 0:  # DeepSpeed broadcasts parameters as bytes, and a 0-D tensor has no such view
                p.data = p.data.reshape(1)
        self.optimizers = build_optimizers(self.model, optimizer)
        if len(self.optimizers.parts) != 1:
            raise ValueError("DeepSpeed takes one optimizer; use optimizer.kind: adamw or engine.kind: local")
        if self.stage == 3:
            self.deepspeed.utils.set_z3_leaf_modules(self.objective, [MoE])
        self.client = self.optimizers.parts[0]
        self.engine, *_ = self.deepspeed.initialize(
            model=self.objective,
            optimizer=self.client,
            config=deepspeed_config(engine, optimizer.clip, accumulate),
            dist_init_required=False,
        )
        self.zero = self.engine.optimizer
        self.names = {name: p for name, p in self.model.named_parameters()}

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
        self._last_norm = self._norm()
        return tally.outcome(whole[0], self.objective.config, self._last_norm)

    def _norm(self) -> float:
        """Global gradient norm before clipping; infinity where DeepSpeed says -1."""
        if self.stage == 0:
            return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self.zero._get_norm_groups()))
        else:
            norm = float(self.zero.scaled_global_norm())
        return norm if norm >= 0 else float("inf")

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

    # ---- state -------------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Full weights and buffers on rank 0's CPU; every rank must call it."""
        out: dict[str, Tensor] = {}
        for name, p in self.names.items():
            with self._whole([p]):
                if self.world.first:
                    out[name] = p.detach().cpu().clone().view(self.shapes[name])
        return {**out, **{name: b.detach().cpu().clone() for name, b in self.model.named_buffers()}}

    def moments(self) -> dict[str, Tensor]:
        """Full Adam moments on rank 0's CPU; every rank must call it."""
        if self.stage == 0:
            return self.optimizers.state_tensors()
        steps = self._steps()
        if steps is None:
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        out: dict[str, Tensor] = {}
        for name, p in self.names.items():
            if not p.requires_grad:
                continue
            for key in MOMENTS:
                value = safe_get_full_optimizer_state(p, key)
                if self.world.first:
                    out[f"{key}.{name}"] = value.detach().cpu().clone().view(self.shapes[name])
            out[f"step.{name}"] = steps.clone()
        return out

    def counters(self) -> dict[str, int]:
        """Nothing beyond the moments."""
        return {}

    def load(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor] | None, counters: dict[str, int] | None = None
    ) -> None:
        """Put weights (and moments) back, whatever engine and world size wrote them."""
        buffers = dict(self.model.named_buffers())
        for name, value in weights.items():
            if name in buffers:
                buffers[name].copy_(value)
            else:
                self._set_weight(self.names[name], value)
        if moments is None:
            return
        if self.stage == 0:
            self.optimizers.load_state_tensors(moments)
        elif moments:
            self._set_moments(moments)

    def _set_weight(self, p: torch.nn.Parameter, value: Tensor) -> None:
        with self._whole([p], modify=True), torch.no_grad():
            p.copy_(value.view(p.shape))
        if self.stage and p.requires_grad:
            self._set_state(p, value, None)

    def _set_state(self, p: torch.nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write this rank's part of a float32 weight (key None) or moment."""
        from deepspeed import utils

        flat = value.to(self.device).reshape(-1)
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(p, flat, key) if key else utils.safe_set_full_fp32_param(p, flat)
            return
        part = int(p.ds_tensor.ds_numel)  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(
            flat, (0, part * self.world.size - flat.numel())
        )  # DeepSpeed's full setter does not pad
        mine = padded[self.world.rank * part : (self.world.rank + 1) * part]
        utils.safe_set_local_optimizer_state(p, mine, key) if key else utils.safe_set_local_fp32_param(p, mine)

    def _set_moments(self, moments: dict[str, Tensor]) -> None:
        step = next(value for name, value in moments.items() if name.startswith("step."))
        for flat in self._partitions():
            state = self.client.state.setdefault(flat, {})
            state["step"] = step.clone()
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(flat.data)
        self._link_moments()
        for name, p in self.names.items():
            for key in MOMENTS:
                if f"{key}.{name}" in moments:
                    self._set_state(p, moments[f"{key}.{name}"], key)

    def _link_moments(self) -> None:
        """Tell every parameter where its moments are. ZeRO-1/2 does so once, after the first GROUP of the first update, when
        the other groups have none yet."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        """This rank's flat float32 pieces, the parameters that torch's AdamW sees."""
        return list(self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups)

    def _steps(self) -> Tensor | None:
        """Adam's step, or None before the first update."""
        for flat in self._partitions():
            if "step" in self.client.state.get(flat, {}):
                return torch.as_tensor(self.client.state[flat]["step"]).detach().cpu().float()
        return None

    @contextlib.contextmanager
    def _whole(self, params: list[torch.nn.Parameter], modify: bool = False) -> Iterator[None]:
        if self.stage == 3:
            with self.deepspeed.zero.GatheredParameters(params, modifier_rank=0 if modify else None):
                yield
        else:
            yield

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
        """A model for probes. Under ZeRO-3 a plain copy on rank 0 and None elsewhere: ranks may then run different numbers of
        forwards, which on the divided model would pair unequal collectives."""
        if self.stage < 3:
            yield self.model
            return
        weights = self.weights()
        if not self.world.first:
            yield None
            return
        with torch.device("meta"):
            plain = Transformer(self.model.config)
        plain.load_state_dict({name: value.to(self.device) for name, value in weights.items()}, assign=True)
        yield plain
