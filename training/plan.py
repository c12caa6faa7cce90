"""What a run would need: memory per GPU, step time, tokens per second, days and money, without building anything.

In: a model config and a machine in words. Out: a `Plan` per ZeRO stage. Weights, gradients and moments are exact counts
divided as ZeRO divides them (arXiv 1910.02054, section 5); activations come from `weft.model.count`; speed is FLOPs over
peak times an assumed MFU, which is a guess until a run has been measured: the plan says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.model.config import ModelConfig
from weft.model.count import active_params, flops_per_token, memory, num_params

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
    assumed_mfu: float = 0.35, gpu_hour: float | None = None,
) -> Plan:  # fmt: skip
    """Estimate one configuration.

    row_tokens: tokens of one micro-batch on one GPU. micro_batches: accumulation steps per GPU. bf16 is autocast over float32
    weights and moments, as the engines run it: weights, gradients and moments take 4, 4 and 8 bytes each, activations 2.
    """
    if gpu not in GPUS:
        raise PlanError(f"gpu {gpu!r} is not known; choose one of {', '.join(GPUS)}")
    if gpus < 1 or zero_stage not in (0, 1, 2, 3) or not 0 < assumed_mfu <= 1:
        raise PlanError(f"need gpus >= 1, zero_stage 0 to 3 and 0 < mfu <= 1; got {gpus}, {zero_stage}, {assumed_mfu}")
    card = GPUS[gpu]
    parts = step_bytes(config, row_tokens, zero_stage, gpus, precision, recompute)
    peak = card.bf16_tflops * 1e12 * (1.0 if precision == "bf16" else 0.5)
    work = flops_per_token(config).train * (4 / 3 if recompute else 1.0)
    compute = row_tokens * micro_batches * work / (peak * assumed_mfu)
    step = compute + _exchange_seconds(config, card, gpus, zero_stage)
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
    config: ModelConfig, tokens: int, zero_stage: int = 0, ranks: int = 1, precision: str = "fp32", recompute: bool = False
) -> tuple[float, float, float, float]:
    """(weights, gradients, moments, activations) in bytes on one rank for a micro-batch of `tokens`."""
    whole = memory(config, tokens, bytes_per_value=4, recompute=recompute)
    activations = whole.activations * (0.5 if precision == "bf16" else 1.0)
    return (
        whole.weights / (ranks if zero_stage >= 3 else 1),
        whole.gradients / (ranks if zero_stage >= 2 else 1),
        whole.optimizer / (ranks if zero_stage >= 1 else 1),
        activations,
    )


def _exchange_seconds(config: ModelConfig, card: Gpu, gpus: int, zero_stage: int) -> float:
    """Communication that is not hidden: half of it, a guess. Stage 3 moves the weights twice more."""
    if gpus == 1:
        return 0.0
    volume = 4.0 * num_params(config) * (2.0 if zero_stage < 3 else 4.0)
    return 0.5 * volume / (card.link_gb_s * 1e9)


def table(config: ModelConfig, **choices: object) -> str:
    """All ZeRO stages side by side."""
    rows = [plan(config, zero_stage=stage, **choices) for stage in (0, 1, 2, 3)]  # type: ignore[arg-type]
    head = f"{rows[0].params / 1e6:,.1f} M weights, {rows[0].active / 1e6:,.1f} M active per token, {rows[0].gpus} GPU(s)"
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
