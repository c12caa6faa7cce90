"""One training step of a model with 1 to 2 G active parameters on one GPU, and the share of the chip's peak that it uses (MFU).

In: random image and text tokens, packed. Out: one line. bfloat16 weights and activations, float32 master weights and Adam
moments; forward, backward and update. MFU counts the model's own arithmetic (`model/count.py`): matmuls, visible pairs only,
three times the forward; recomputation and padding do not count. The peak is the vendor's dense bfloat16 rate.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from weft.benchmarks.speed.gpu_attention import stream_layout
from weft.benchmarks.speed.gpu_layers import SHARES, SLICES, SMOKE_SLICES
from weft.benchmarks.speed.gpu_table import Bench, Call, Figure, Line, NotMeasured, line
from weft.kernels import moe
from weft.kernels.attention import use_backend
from weft.kernels.sliced_loss import sliced_cross_entropy
from weft.model.config import ModelConfig
from weft.model.count import active_params, flops_per_token, num_params

MUST, AIM = 0.25, 0.33


def step_config(smoke: bool = False) -> ModelConfig:
    """The `large` preset with 20 layers and 32 experts, which fits one GPU of 141 GB with its optimizer; or a tiny one."""
    from weft.model.presets import preset

    ends = torch.tensor(SMOKE_SLICES if smoke else SLICES).cumsum(0).tolist()
    slices = tuple((end - size, end) for end, size in zip(ends, SMOKE_SLICES if smoke else SLICES))
    if smoke:
        return preset("tiny", vocab_size=ends[-1], slices=slices, width=64, heads=2, head_width=32, experts_per_token=2)
    return preset("large", vocab_size=ends[-1], slices=slices, layers=20, experts=32)


def batch(config: ModelConfig, tokens: int, device: str) -> tuple[Any, Tensor, Tensor]:
    """Packed image and text tokens, targets [T] and the slice of each [T]."""
    layout = stream_layout("image+text", tokens, None, "cpu")
    at = torch.arange(tokens, dtype=torch.int32)
    start = layout.document_start
    document = torch.cumsum(start == at, 0, dtype=torch.int32) - 1
    two_way = torch.where((layout.born != at) | (layout.end_key > at + 1), layout.born, -1).int()
    landmark = torch.zeros(tokens, dtype=torch.bool)
    landmark[layout.landmark_at[layout.landmark_at < tokens].long()] = True
    kind = torch.multinomial(torch.tensor(SHARES), tokens, replacement=True)
    first, end = torch.tensor(config.slices).unbind(1)
    target = first[kind] + (torch.rand(tokens) * (end - first)[kind]).long()
    tensors = {
        "ids": torch.randint(1, config.vocab_size, (tokens,)),
        "modality": (two_way >= 0).long(),
        "channel": torch.zeros(tokens, dtype=torch.int64),
        "position": (at - start)[:, None].expand(-1, 3).int(),
        "document": document,
        "landmark": landmark,
        "two_way": two_way,
    }
    moved = {name: x.to(device) for name, x in tensors.items()}
    return SimpleNamespace(**moved, features={}, feature_at={}), target.to(device), kind.to(device)


def model_flops(config: ModelConfig, given: Any) -> float:
    """Arithmetic of one training step: visible pairs counted one by one, the rest per token."""
    from weft.kernels.layout import StreamLayout

    tokens = len(given.ids)
    seen = {}
    for window in {None, config.window}:
        layout = StreamLayout.build(
            given.document, given.landmark, given.two_way, window, config.max_landmarks if window else None
        )
        seen[window] = layout.pairs
    share = sum((end - first) * part for (first, end), part in zip(config.slices, SHARES))
    per_token = flops_per_token(config, context=0, slice_size=share)
    pairs = sum(seen[None if config.is_full(layer) else config.window] for layer in range(config.layers))
    return 3 * (per_token.forward * tokens + 4 * pairs * config.heads * config.head_width)


class Step:
    """A model, its float32 master weights and AdamW; `run` is one step and returns the loss."""

    def __init__(self, config: ModelConfig, given: Any, target: Tensor, kind: Tensor, dtype: torch.dtype) -> None:
        from weft.model.transformer import Transformer

        device = given.ids.device
        with torch.device(device):
            self.model = Transformer(config).to(dtype)
        self.given, self.target, self.kind = given, target, kind
        self.weights = list(self.model.parameters())
        self.master = [p.detach().float().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.master, 1e-4, fused=True)

    def run(self, loss_backend: str) -> list[Tensor]:
        """Forward, backward, update."""
        output = self.model(self.given)
        matrix = self.model.output_weight
        nll, _ = sliced_cross_entropy(
            output.hidden, matrix, self.target, self.kind, self.model.config.slices, backend=loss_backend
        )
        loss = nll.mean() + 1e-3 * output.router.z_loss
        loss.backward()
        for weight, master in zip(self.weights, self.master):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_([weight.detach() for weight in self.weights], self.master)
        self.model.update_router_bias(output.router.load)
        return [nll.detach().mean()]


def step_line(bench: Bench, tokens: int, smoke: bool = False) -> Line:
    """What `auto` chooses everywhere, and all of our Triton kernels."""
    config = step_config(smoke)
    given, target, kind = batch(config, tokens, bench.device)
    flops = model_flops(config, given)
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    held: list[Step] = []

    def auto() -> Call:
        held[:] = held or [Step(config, given, target, kind, dtype)]
        return lambda: held[0].run("auto")

    def triton() -> Call:
        from weft.kernels import triton_attention

        probe = torch.empty(0, 1, config.head_width, device=bench.device, dtype=dtype)
        reason = triton_attention.supports(probe, probe, probe, stream_layout("text", 1, None, bench.device))
        if reason:
            raise NotMeasured(reason)
        held[:] = held or [Step(config, given, target, kind, dtype)]

        def run() -> list[Tensor]:
            with use_backend("triton"), moe.CHOICE.use("triton"):
                return held[0].run("triton")

        return run

    extra: dict[str, float | str | None] = {
        "active parameters": float(active_params(config)),
        "parameters": float(num_params(config)),
        "model TFLOP per step": flops / 1e12,
        "must MFU": MUST,
        "aim MFU": AIM,
    }
    name = (
        f"training step, {active_params(config) / 1e9:.2g} G of {num_params(config) / 1e9:.2g} G parameters active, T={tokens}"
    )
    made = {"auto": auto, "all triton": triton}
    result = line(bench, "step", name, made, flops=flops, ours=("auto", "all triton"), extra=extra)
    for who, figure in result.figures.items():
        result.extra[f"MFU, {who}"] = mfu(figure, bench.device)
    return result


def mfu(figure: Figure, device: str) -> float | str:
    """Model arithmetic per second over the vendor's peak; a sentence where that peak is not known."""
    from weft.training.plan import GPUS

    if figure.useful_tflops is None:
        return "not measured"
    name = torch.cuda.get_device_name().lower() if device == "cuda" else "a CPU"
    known = next((gpu for key, gpu in GPUS.items() if key in name), None)
    return figure.useful_tflops / known.bf16_tflops if known else f"not measured: the peak of {name} is not known"
