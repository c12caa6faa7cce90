"""The lines of the GPU table beside attention: sliced loss, routed experts, QK-norm with rotation.

Loss: forward and backward over slices of 65,536 text, 32,768 image, 8,192 audio and 1,024 action ids; rivals compute every id.
Experts: the fused kernels against the composition around `F.grouped_mm`, Liger's fused MoE and SonicMoE, the routing given.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.benchmarks.speed.gpu_table import Bench, Call, Goal, Line, NotMeasured, line
from weft.benchmarks.speed.report import relative_error
from weft.kernels import moe
from weft.kernels.sliced_loss import sliced_cross_entropy

SLICES, SHARES = (65536, 32768, 8192, 1024), (0.45, 0.45, 0.08, 0.02)
SMOKE_SLICES = (67, 33, 9, 2)
LOSS_RIVALS = ("liger", "linear_cross_entropy", "matmul + cross_entropy")
SONIC = "not installed (pip install sonic-moe; 0.1.2 asks for torch <= 2.9.1 and Python >= 3.12)"


def needs(package: str, how: str) -> None:
    """Raises NotMeasured where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise NotMeasured(f"not installed ({how})")


def loss_line(bench: Bench, tokens: int, width: int, sizes: tuple[int, ...] = SLICES) -> Line:
    """One line; `useful` counts the products with each token's own slice only: less than what the rivals compute."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    slices = tuple((end - size, end) for end, size in zip(ends, sizes))
    index = torch.multinomial(torch.tensor(SHARES), tokens, replacement=True)
    borders = torch.tensor(slices)[index]
    target = (borders[:, 0] + (torch.rand(tokens) * (borders[:, 1] - borders[:, 0])).long()).to(bench.device)
    index = index.to(bench.device)
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    made = (torch.randn(n, width, device=bench.device) for n in (tokens, ends[-1]))
    hidden, weight = ((x * width**-0.5).to(dtype).requires_grad_() for x in made)
    exact = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    truth = torch.autograd.grad(
        sliced_cross_entropy(exact[0], exact[1], target, index, slices, backend="torch")[0].mean(), exact
    )

    def sliced(backend: str) -> Callable[[], Call]:
        def make() -> Call:
            if backend == "triton":
                from weft.kernels.triton_sliced_loss import supports

                reason = supports(hidden, weight)
                if reason:
                    raise NotMeasured(reason)

            def run() -> list[Tensor]:
                loss = sliced_cross_entropy(hidden, weight, target, index, slices, backend=backend)[0].mean()
                return list(torch.autograd.grad(loss, (hidden, weight)))

            return run

        return make

    def whole(function: Callable[[], Tensor]) -> Call:
        return lambda: list(torch.autograd.grad(function(), (hidden, weight)))

    def liger() -> Call:
        needs("liger_kernel", "pip install liger-kernel")
        if bench.device != "cuda":
            raise NotMeasured("Liger's kernels need an NVIDIA GPU")
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def loss() -> Tensor:
            result = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target)
            return result[0] if isinstance(result, tuple) else result

        return whole(loss)

    def library() -> Call:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise NotMeasured("not installed: this torch has no linear_cross_entropy")
        return whole(lambda: function(hidden, weight, target))

    def plain() -> Call:
        return whole(lambda: F.cross_entropy((hidden @ weight.T).float(), target))

    made_by = {"triton": sliced("triton"), "torch sliced": sliced("torch")}
    made_by |= dict(zip(LOSS_RIVALS, (liger, library, plain)))
    goals = tuple(Goal(rival, 1.3, 1.8) for rival in LOSS_RIVALS[:2])
    flops = 6.0 * width * float((borders[:, 1] - borders[:, 0]).sum())

    def check(results: list[Tensor]) -> dict[str, float]:
        return {name: relative_error(a, b) for name, a, b in zip(("d hidden", "d weight"), results, truth)}

    name = f"sliced loss N={tokens} D={width} V={ends[-1]} forward + backward"
    ours = ("triton", "torch sliced")
    return line(bench, "loss", name, made_by, flops=flops, check=check, unchecked=LOSS_RIVALS, ours=ours, goals=goals)


MOE = ((32768, 2048, 768, 64, 8), (32768, 2048, 768, 128, 8), (32768, 2048, 1536, 16, 2))
SMOKE_MOE = ((40, 24, 16, 4, 2),)


def moe_lines(bench: Bench, shapes: tuple[tuple[int, int, int, int, int], ...] = MOE) -> Iterator[Line]:
    """Tokens, width, expert width, experts, experts per token of each shape; forward, then forward and backward."""
    for shape in shapes:
        for backward in (False, True):
            yield moe_line(bench, *shape, backward)


def moe_line(bench: Bench, tokens: int, width: int, hidden: int, experts: int, choices: int, backward: bool) -> Line:
    """Routing is given, uniform over experts; its weights sum to one."""
    dtype, device = (torch.bfloat16 if bench.device == "cuda" else torch.float32), bench.device
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    expert = torch.rand(tokens, experts, device=device).topk(choices, sorted=False).indices
    weight = torch.rand(tokens, choices, device=device).softmax(1)
    gate_up = torch.randn(experts, 2 * hidden, width, device=device, dtype=dtype) * width**-0.5
    down = torch.randn(experts, width, hidden, device=device, dtype=dtype) * hidden**-0.5
    grad = torch.randn_like(x)
    inputs = [y.requires_grad_(backward) for y in (x, weight, gate_up, down)]
    some = torch.randperm(tokens, device=device)[:64]
    truth = moe_rows(x[some], weight[some], expert[some], gate_up, down)

    def whole(function: Callable[[], Tensor]) -> Call:
        def run() -> list[Tensor]:
            out = function()
            return [out.detach(), *(torch.autograd.grad(out, inputs, grad) if backward else ())]

        return run

    def backend(name: str) -> Callable[[], Call]:
        def make() -> Call:
            reason = dict(moe.why(x, gate_up, down))[name]
            if reason != "runs":
                raise NotMeasured(reason)
            return whole(lambda: moe.moe_ffn(x, weight, expert, gate_up, down, backend=name))

        return make

    def liger() -> Call:
        needs("liger_kernel", "pip install liger-kernel")
        if device != "cuda":
            raise NotMeasured("Liger's kernels need an NVIDIA GPU")
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return whole(lambda: LigerFusedMoEFunction.apply(x, gate_up, down, expert.int(), weight))

    def sonic() -> Call:
        if importlib.util.find_spec("sonicmoe") is None:
            raise NotMeasured(SONIC)
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType

        token = torch.arange(tokens, device=device, dtype=torch.int32).repeat_interleave(choices)
        stream = torch.cuda.current_stream().cuda_stream

        def run() -> Tensor:
            matrices = (gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None)
            routed = (weight.flatten(), token, expert.flatten().int())
            return moe_general_routing_inputs(
                x, *routed, *matrices, experts, stream, ActivationType.SWIGLU, not backward, concat_layout=True
            )[0]

        return whole(run)

    def check(results: list[Tensor]) -> dict[str, float]:
        return {"out": relative_error(results[0][some], truth)}

    made = {
        "triton": backend("triton"),
        "grouped_mm composition": backend("torch"),
        "liger fused moe": liger,
        "sonicmoe": sonic,
    }
    way = "forward + backward" if backward else "forward"
    flops = 6.0 * tokens * choices * width * hidden * (3 if backward else 1)
    goals = (Goal("grouped_mm composition", 1.05, 1.3),)
    name = f"T={tokens} D={width} F={hidden} E={experts} S={choices} {way}"
    return line(bench, "moe", name, made, flops=flops, check=check, ours=("triton",), goals=goals)


@torch.no_grad()
def moe_rows(x: Tensor, weight: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition in float64, token by token."""
    rows = []
    for token, shares, numbers in zip(x.double(), weight.double(), expert.tolist()):
        parts = [(gate_up[number].double() @ token).chunk(2) for number in numbers]
        rows.append(sum(s * (down[n].double() @ (F.silu(g) * u)) for s, n, (g, u) in zip(shares, numbers, parts)))
    return torch.stack(rows)  # type: ignore[arg-type]


def norm_line(bench: Bench, tokens: int, width: int, heads: int = 16, kv_heads: int = 4) -> Line:
    """QK-norm with rotation, forward and backward: the CUDA kernel against the same in plain torch, and compiled."""
    from weft.kernels import cuda, rotary

    device, dtype = bench.device, torch.bfloat16 if bench.device == "cuda" else torch.float32
    position = torch.randint(0, 5000, (tokens, 3), device=device)
    table = rotary.rope_table(position, width)
    q, k = (torch.randn(tokens, n, width, device=device, dtype=dtype, requires_grad=True) for n in (heads, kv_heads))
    weights = [torch.ones(width, device=device, requires_grad=True) for _ in range(2)]
    grads = [torch.randn_like(x) for x in (q, k)]

    def whole(function: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda: list(torch.autograd.grad(function(q, k, *weights, *table), (q, k, *weights), grads))

    def ours() -> Call:
        reason = cuda.supports(q, k, *weights)
        if reason:
            raise NotMeasured(reason)
        return whole(cuda.qk_norm_rope)

    def compiled() -> Call:
        if device != "cuda":
            raise NotMeasured("compiled on a GPU only")
        return whole(torch.compile(rotary.qk_norm_rope, dynamic=False))

    exact = [x.detach().double().requires_grad_() for x in (q, k, *weights)]
    cos, sin = (x.double() for x in table)
    truth = torch.autograd.grad(
        rotary.qk_norm_rope(exact[0], exact[1], exact[2], exact[3], cos, sin), exact, [g.double() for g in grads]
    )

    def check(results: list[Tensor]) -> dict[str, float]:
        return {"worst gradient": max(relative_error(a, b) for a, b in zip(results, truth))}

    made = {"cuda": ours, "torch": lambda: whole(rotary.qk_norm_rope), "torch compiled": compiled}
    name = f"QK-norm + rotation T={tokens} K={width} H={heads}/{kv_heads} forward + backward"
    return line(bench, "norm", name, made, check=check, ours=("cuda",))
