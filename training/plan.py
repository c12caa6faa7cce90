"""What a run would need: memory per GPU, step time, tokens per second, days and money, without building anything.

In: a model config and a machine in words. Out: a `Plan` per ZeRO stage. Weights, gradients and moments are exact counts
divided as ZeRO divides them (arXiv 1910.02054, section 5) and as expert parallelism divides routed experts; activations come
from `weft.model.count`; speed is FLOPs over peak times an MFU, assumed until a run has been measured: the plan says which.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.model.config import ModelConfig
from weft.model.count import active_params, flops_per_token, memory, num_params, param_shapes
from weft.training.expert_parallel import is_expert
from weft.training.tracking import read_jsonl

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Makers' figures: memory, dense bf16 arithmetic, link between GPUs of a node."""

    memory_gib: float
    bf16_tflops: float
    link_gb_s: float
    """One direction, GB/s."""


GPUS: dict[str, Gpu] = {
    "rtx3090": Gpu(24, 71, 16),
    "rtx4090": Gpu(24, 165, 16),
    "l40s": Gpu(45, 362, 32),
    "v100": Gpu(32, 125, 150),
    "a100-40": Gpu(40, 312, 300),
    "a100": Gpu(80, 312, 300),
    "h100": Gpu(80, 989, 450),
    "h200": Gpu(141, 989, 450),
    "b200": Gpu(180, 2250, 900),
    "mi300x": Gpu(192, 1307, 448),
}
_NAMES = {
    "H200": "h200",
    "H100": "h100",
    "B200": "b200",
    "A100": "a100",
    "L40S": "l40s",
    "4090": "rtx4090",
    "3090": "rtx3090",
    "V100": "v100",
}


ASSUMED_MFU = 0.35
"""Share of the peak that a step is assumed to reach. A guess: no run of this model on many GPUs has been measured."""


class PlanError(ValueError):
    """A plan was asked for something that does not exist."""


@dataclass(frozen=True)
class Plan:
    """One row of the estimate."""

    zero_stage: int
    gpus: int
    params: int
    active: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    fits: bool
    tokens_per_s: float
    step_s: float
    days: float | None
    cost: float | None

    @property
    def memory_gib(self) -> float:
        """Per GPU."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib


def plan(
    config: ModelConfig, *, gpus: int = 8, gpu: str = "h200", zero_stage: int = 1, row_tokens: int = 16384,
    micro_batches: int = 1, total_tokens: float | None = None, precision: str = "bf16", recompute: bool = True,
    assumed_mfu: float = ASSUMED_MFU, gpu_hour: float | None = None, expert_parallel: int = 1,
) -> Plan:  # fmt: skip
    """Estimate one configuration.

    row_tokens: tokens of one micro-batch on one GPU. micro_batches: accumulation steps per GPU. bf16 is autocast over float32
    weights and moments, as the engines run it: weights, gradients and moments take 4, 4 and 8 bytes each, activations 2.
    """
    if gpu not in GPUS:
        raise PlanError(f"gpu {gpu!r} is not known; choose one of {', '.join(GPUS)}")
    if gpus < 1 or zero_stage not in (0, 1, 2, 3) or not 0 < assumed_mfu <= 1:
        raise PlanError(f"need gpus >= 1, zero_stage 0 to 3 and 0 < mfu <= 1; got {gpus}, {zero_stage}, {assumed_mfu}")
    divides = expert_parallel > 0 and gpus % expert_parallel == 0 and config.experts % expert_parallel == 0
    if not divides or (expert_parallel > 1 and not expert_params(config)):
        raise PlanError(f"expert_parallel {expert_parallel} must divide {gpus} GPU(s) and {config.experts} experts evenly")
    card = GPUS[gpu]
    parts = step_bytes(config, row_tokens, zero_stage, gpus, precision, recompute, expert_parallel)
    peak = card.bf16_tflops * 1e12 * (1.0 if precision == "bf16" else 0.5)
    work = flops_per_token(config).train * (4 / 3 if recompute else 1.0)
    compute = row_tokens * micro_batches * work / (peak * assumed_mfu)
    travel = _travel_seconds(config, card, row_tokens, expert_parallel, 2 if precision == "bf16" else 4, recompute)
    step = compute + micro_batches * travel + _exchange_seconds(config, card, gpus, zero_stage, expert_parallel)
    rate = gpus * row_tokens * micro_batches / step
    days = total_tokens / rate / 86400 if total_tokens else None
    return Plan(
        zero_stage,
        gpus,
        num_params(config),
        active_params(config),
        parts[0] / GIB,
        parts[1] / GIB,
        parts[2] / GIB,
        parts[3] / GIB,
        fits=sum(parts) <= 0.92 * card.memory_gib * GIB,  # the rest: allocator, kernels, communication buffers
        tokens_per_s=rate,
        step_s=step,
        days=days,
        cost=days * 24 * gpus * gpu_hour if days and gpu_hour else None,
    )


def step_bytes(
    config: ModelConfig, tokens: int, zero_stage: int = 0, ranks: int = 1, precision: str = "fp32", recompute: bool = False,
    expert_parallel: int = 1,
) -> tuple[float, float, float, float]:  # fmt: skip
    """(weights, gradients, moments, activations) in bytes on one rank for a micro-batch of `tokens`.

    What a ZeRO stage divides is 1 / ranks either way: divided experts are divided further over the ranks that hold the same.
    Activations are those of a balanced load: a rank multiplies as many rows as it sends.
    """
    whole = memory(config, tokens, bytes_per_value=4, recompute=recompute)
    share = 1 - (1 - 1 / expert_parallel) * expert_params(config) / num_params(config)
    divided = [1 / ranks if zero_stage >= stage else share for stage in (3, 2, 1)]
    activations = whole.activations * (0.5 if precision == "bf16" else 1.0)
    return whole.weights * divided[0], whole.gradients * divided[1], whole.optimizer * divided[2], activations


def expert_params(config: ModelConfig) -> int:
    """Parameters of all routed experts."""
    return sum(math.prod(shape) for name, shape in param_shapes(config).items() if is_expert(name))


def _exchange_seconds(config: ModelConfig, card: Gpu, gpus: int, zero_stage: int, expert_parallel: int) -> float:
    """Communication that is not hidden: half of it, a guess. Stage 3 moves the weights twice more."""
    if gpus == 1:
        return 0.0
    params = num_params(config) - (1 - 1 / expert_parallel) * expert_params(config)
    volume = 4.0 * params * (2.0 if zero_stage < 3 else 4.0)
    return 0.5 * volume / (card.link_gb_s * 1e9)


def _travel_seconds(config: ModelConfig, card: Gpu, tokens: int, size: int, bytes_per_value: int, recompute: bool) -> float:
    """Rows on their way to their experts and back, forward and backward (and forward again), nothing of it hidden."""
    routed = sum(config.is_routed(layer) for layer in range(config.layers))
    rows = tokens * config.experts_per_token * routed * (1 - 1 / size)
    return rows * config.width * bytes_per_value * (6 if recompute else 4) / (card.link_gb_s * 1e9)


def table(config: ModelConfig, **choices: object) -> str:
    """All ZeRO stages side by side."""
    rows = [plan(config, zero_stage=stage, **choices) for stage in (0, 1, 2, 3)]  # type: ignore[arg-type]
    head = f"{rows[0].params / 1e6:,.1f} M weights, {rows[0].active / 1e6:,.1f} M active per token, {rows[0].gpus} GPU(s)"
    if choices.get("expert_parallel", 1) != 1:
        head += f", routed experts ({expert_params(config) / 1e6:,.1f} M) divided by {choices['expert_parallel']}"
    lines = [head, "stage  weights    grads  moments  activations   total GiB  fits  tokens/s     step s   days      cost"]
    for r in rows:
        sizes = (
            f"{r.weights_gib:8.2f} {r.gradients_gib:8.2f} {r.optimizer_gib:8.2f} {r.activations_gib:12.2f} {r.memory_gib:11.2f}"
        )
        days = f"{r.days:6.1f}" if r.days is not None else "     -"
        cost = f"{r.cost:9,.0f}" if r.cost is not None else "        -"
        fits = "yes" if r.fits else " no"
        lines.append(f"{r.zero_stage:5d} {sizes}   {fits} {r.tokens_per_s:9,.0f} {r.step_s:10.3f} {days} {cost}")
    return "\n".join(lines)


def mfu(config: ModelConfig, tokens_per_s: float, device: torch.device, context: int) -> float | None:
    """Share of the GPU's peak bf16 arithmetic that the model's own FLOPs use; None on a device whose peak is not known."""
    if device.type != "cuda" or tokens_per_s <= 0:
        return None
    name = torch.cuda.get_device_name(device)
    known = next((key for word, key in _NAMES.items() if word in name), None)
    return (
        None if known is None else tokens_per_s * flops_per_token(config, context / 2).train / (GPUS[known].bf16_tflops * 1e12)
    )


def measured_mfu(run: Path) -> float:
    """The median MFU of the later half of a run on GPUs, from its `speed.jsonl`. Raises `PlanError` if it holds none."""
    path = run / "speed.jsonl"
    found = [float(row["mfu"]) for row in read_jsonl(path) if "mfu" in row] if path.exists() else []
    if not found:
        raise PlanError(f"{path} holds no MFU: only runs on a GPU with a known peak write one; pass mfu as a number instead")
    return statistics.median(found[len(found) // 2 :])
