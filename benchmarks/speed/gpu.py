"""The GPU kernels against the libraries, in one process on the same random inputs. Needs an NVIDIA GPU; elsewhere it says so.

Attention: our Triton kernels against FlexAttention, xformers, and torch's attention with a dense causal mask (which is another,
easier mask to express, and more work). Rows: four kinds of stream x length x window x head width x direction, 16 query and 4 kv
heads, bfloat16. Sliced loss against its torch path and the whole vocabulary. QK-norm with rotation against plain torch.
`useful` counts visible pairs only; the same run's own matmul rate is printed first, to divide by.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.benchmarks.speed.report import Row, compare, finish, measure, peak_bytes, relative_error, speed_parser, start
from weft.kernels.attention import attention, why
from weft.kernels.layout import StreamLayout

HEADS, KV_HEADS = 16, 4
STREAMS = ("text", "image+text", "video", "documents")
MUST, AIM = {False: 1.1, True: 1.0}, {False: 1.5, True: 1.3}  # against FlexAttention: forward, with backward
WARM_S = 60.0  # one row's rounds end here


@dataclass(frozen=True)
class Case:
    """One row of the attention table."""

    stream: str
    length: int
    window: int | None
    width: int
    backward: bool

    @property
    def name(self) -> str:
        way = "forward + backward" if self.backward else "forward"
        return f"{self.stream} L={self.length} W={self.window or 'full'} K={self.width} {way}"


def cases(quick: bool) -> Iterator[Case]:
    """Every row, or one per kind of stream."""
    lengths, windows, widths = ((8192,), (1024,), (128,)) if quick else ((8192, 32768), (512, 1024, None), (64, 128))
    for stream in STREAMS:
        for length in lengths:
            for window in windows:
                for width in widths:
                    yield from (Case(stream, length, window, width, backward) for backward in (False, True))


def stream_layout(kind: str, length: int, window: int | None, device: str, seed: int = 0) -> StreamLayout:
    """text: documents of about 800 tokens. image+text: images of 256, 576 or 1024 two-way tokens between texts of 64 to 512.
    video: frames of 256 two-way tokens and a closing token. documents: about 4000 tokens, causal, no landmarks."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    document, landmark, two_way = torch.zeros(length, dtype=torch.int32), torch.zeros(length, dtype=torch.bool), []
    at, number = 0, 0
    block = torch.full((length,), -1, dtype=torch.int32)
    while at < length:
        body = {"text": lambda: draw(100, 1500), "documents": lambda: draw(2000, 6000)}.get(kind, lambda: draw(6000, 12000))()
        end = min(at + body, length)
        document[at:end] = number
        landmark[at] = kind != "documents"
        while at < end and kind in ("image+text", "video"):
            text = draw(64, 512) if kind == "image+text" else 0
            image = (256, 576, 1024)[draw(0, 3)] if kind == "image+text" else 256
            first = at + text
            if first + image + 1 > end:
                break
            two_way.append(first)
            block[first : first + image] = len(two_way)
            landmark[first + image] = True
            at = first + image + 1
        at, number = end, number + 1
    return StreamLayout.build(document, landmark, block, window).to(device)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, queries: Tensor) -> Tensor:
    """[n H K] in float64: the attention of some queries, by the definition."""
    group = q.shape[1] // k.shape[1]
    seen = (layout.born <= queries[:, None]) & (queries[:, None] < layout.dies)
    wide = q[queries].double().unflatten(1, (k.shape[1], group))
    score = torch.einsum("ngrk,tgk->ngrt", wide, k.double()) * q.shape[-1] ** -0.5
    weight = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("ngrt,tgk->ngrk", weight, v.double()).flatten(1, 2)


def matmul_rate() -> float:
    """TFLOP/s of one bfloat16 product of 8192^3 in this process."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = measure({"matmul": lambda: a @ b}, 30, warmup=5)["matmul"]
    return 2 * 8192**3 / seconds / 1e12


def attention_row(case: Case, rounds: int, rate: float) -> Row:
    """Ours is the Triton backend, the rival FlexAttention; every other backend's time stands in `extra`."""
    layout = stream_layout(case.stream, case.length, case.window, "cuda")
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(case.length, n, case.width, device="cuda", dtype=torch.bfloat16) for n in heads)
    grad = torch.randn_like(q)
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]

    def call(function: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            out = function()
            return [out, *(torch.autograd.grad(out, inputs, grad) if case.backward else ())]

        return run

    def dense_causal() -> Tensor:
        queries, keys, values = (x.transpose(0, 1)[None] for x in inputs)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    reasons = dict(why(q, k, v, layout))
    names = [name for name in ("triton", "flex", "xformers") if reasons[name] == "runs"]
    calls = {name: call(lambda name=name: attention(q, k, v, layout, backend=name)) for name in names}  # type: ignore[misc]
    calls["dense_causal"] = call(dense_causal)
    seconds = measure(calls, rounds, warmup=3, budget_s=WARM_S)
    flops = layout.flops(HEADS, case.width) * (3.5 if case.backward else 1)
    extra = {f"{name}_ms": value * 1e3 for name, value in seconds.items()}
    extra |= {f"{name}_useful_tflops": flops / value / 1e12 for name, value in seconds.items()}
    queries = torch.randperm(case.length, device="cuda")[:64]
    error = None
    if "triton" in calls:
        extra["of_matmul_rate"] = extra["triton_useful_tflops"] / rate
        extra["peak_mib"] = peak_bytes(calls["triton"]) / 2**20
        error = relative_error(calls["triton"]()[0][queries], exact_rows(q, k, v, layout, queries))
    note = "; ".join(
        f"{name} {reason}" for name, reason in reasons.items() if name in ("triton", "xformers") and reason != "runs"
    )
    must, aim = MUST[case.backward], AIM[case.backward]
    return compare(
        case.name, seconds.get("triton"), seconds.get("flex"), error=error, note=note, extra=extra, must=must, aim=aim
    )


def loss_row(tokens: int, width: int, rounds: int) -> Row:
    """Forward and backward over slices of 65,536 text, 32,768 image, 8,192 audio and 1,024 action ids; the rival computes the
    logits of the whole vocabulary with `torch.nn.functional.linear_cross_entropy` where torch has it, else with matmul."""
    from weft.kernels.sliced_loss import sliced_cross_entropy

    sizes, shares = (65536, 32768, 8192, 1024), (0.45, 0.45, 0.08, 0.02)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    slices = tuple((end - size, end) for end, size in zip(ends, sizes))
    index = torch.multinomial(torch.tensor(shares), tokens, replacement=True)
    borders = torch.tensor(slices)[index]
    target = (borders[:, 0] + (torch.rand(tokens) * (borders[:, 1] - borders[:, 0])).long()).cuda()
    index = index.cuda()
    made = (torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (tokens, ends[-1]))
    hidden, weight = (x.mul_(width**-0.5).requires_grad_() for x in made)
    whole = getattr(F, "linear_cross_entropy", None)

    def rival() -> object:
        loss = whole(hidden, weight, target) if whole else F.cross_entropy((hidden @ weight.T).float(), target)
        return torch.autograd.grad(loss, (hidden, weight))

    def ours(backend: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            loss = sliced_cross_entropy(hidden, weight, target, index, slices, backend=backend)[0]
            return [loss, *torch.autograd.grad(loss.mean(), (hidden, weight))]

        return run

    calls: dict[str, Callable[[], object]] = {"ours": ours("triton"), "torch": ours("torch"), "rival": rival}
    seconds = measure(calls, rounds, warmup=2, budget_s=WARM_S)
    error = max(relative_error(a, b) for a, b in zip(ours("triton")(), ours("torch")()))
    extra = {"torch_path_ms": seconds["torch"] * 1e3, "peak_mib": peak_bytes(calls["ours"]) / 2**20}
    name = f"sliced loss N={tokens} D={width} forward + backward"
    return compare(name, seconds["ours"], seconds["rival"], must=1.3, aim=1.8, error=error, extra=extra)


def norm_row(tokens: int, width: int, rounds: int) -> Row:
    """QK-norm with rotation, forward and backward, against the same in plain torch."""
    from weft.kernels import cuda, rotary

    position = torch.randint(0, 5000, (tokens, 3), device="cuda")
    table = rotary.rope_table(position, width)
    q, k = (torch.randn(tokens, n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (HEADS, KV_HEADS))
    weights = [torch.ones(width, device="cuda", requires_grad=True) for _ in range(2)]
    name = f"QK-norm + rotation T={tokens} K={width} forward + backward"
    reason = cuda.supports(q, k, *weights)
    if reason:
        return compare(name, None, None, note=reason)
    grads = [torch.randn_like(x) for x in (q, k)]

    def call(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(q, k, *weights, *table), (q, k, *weights), grads)

    calls = {"ours": call(cuda.qk_norm_rope), "rival": call(rotary.qk_norm_rope)}
    error = max(relative_error(a, b) for a, b in zip(calls["ours"](), calls["rival"]()))
    seconds = measure(calls, rounds, warmup=3)
    return compare(name, seconds["ours"], seconds["rival"], error=error)


def plot(rows: list[Row], path: Path) -> None:
    """Useful TFLOP/s of every backend, one group of bars per attention row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if any(key.endswith("_useful_tflops") for key in row.extra)]
    backends = [name for name in ("triton", "flex", "xformers") if any(f"{name}_useful_tflops" in row.extra for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.3 * max(1, len(rows)) * max(1, len(backends))))
    for place, backend in enumerate(backends):
        values = [row.extra.get(f"{backend}_useful_tflops", 0.0) for row in rows]
        axes.barh([i + place * 0.8 / len(backends) for i in range(len(rows))], values, 0.8 / len(backends), label=backend)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("useful TFLOP/s (visible pairs only)")
    if backends:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def run(args: argparse.Namespace) -> list[Row]:
    """Every row; nothing is left out because it lost."""
    rounds = 20 if args.quick else 50
    rate = matmul_rate()
    print(f"bfloat16 matmul of 8192^3 in this run: {rate:.0f} TFLOP/s")
    rows = [attention_row(case, rounds, rate) for case in cases(args.quick)]
    rows.append(loss_row(4096 if args.quick else 32768, 2048, 10))
    return [*rows, *(norm_row(32768, width, rounds) for width in (64, 128))]


def main(argv: list[str] | None = None) -> int:
    parser = speed_parser("gpu", __doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the attention rows as a PNG")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("not measured: no NVIDIA GPU is here (torch.cuda.is_available() is false)")
        return 0
    start(args)
    rows = run(args)
    finish(rows, args)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
