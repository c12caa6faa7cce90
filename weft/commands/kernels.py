"""`weft kernels`: what runs here and what `auto` would choose for a shape; `weft kernels build` and `weft kernels bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

Row = tuple[str, str, str]
PACKAGES = ("torch", "triton", "xformers", "flash-attn-4", "liger-kernel", "sonic-moe")


@dataclass(frozen=True)
class Shape:
    """The call that is asked about."""

    length: int
    heads: int
    kv_heads: int
    head_width: int
    window: int | None
    landmark_every: int
    dtype: str
    backward: bool
    lse: bool
    width: int
    experts: int
    experts_per_token: int
    expert_width: int


def attention_rows(shape: Shape, device: str, dtype: Any) -> list[Row]:
    """Every attention backend, in auto's order, and why it would or would not run this call."""
    import torch

    from weft.kernels.attention import ORDER, why
    from weft.kernels.layout import StreamLayout

    at = torch.arange(shape.length, device=device)
    landmark = at % shape.landmark_every == 0 if shape.landmark_every else at < 0
    layout = StreamLayout.build(torch.zeros_like(at), landmark, torch.full_like(at, -1), window=shape.window)
    q, k = (torch.zeros(shape.length, n, shape.head_width, device=device, dtype=dtype) for n in (shape.heads, shape.kv_heads))
    q.requires_grad_(shape.backward)
    rows: list[Row] = []
    first: str | None = None
    for name, reason in why(q, k, k, layout, return_lse=shape.lse):
        if reason != "runs":
            rows.append((name, "no", reason))
        elif name not in ORDER[device]:
            rows.append((name, "by name", f"auto never takes it on {device}"))
        elif first is None:
            rows.append((name, "CHOSEN", "the first of auto's order that supports this call"))
            first = name
        else:
            rows.append((name, "runs", f"auto asks it after {first}"))
    return rows


def other_rows(shape: Shape, device: str, dtype: Any) -> list[tuple[str, list[Row]]]:
    """The implementations of the sliced loss, the routed experts, QK-norm with rotation, and decoding over a paged cache."""
    import torch

    from weft.kernels import cuda, cuda_decode, moe, norm_rope, triton_sliced_loss

    def rows(ours: str, reason: str | None, how: str, picked: str = "torch") -> list[Row]:
        """torch and the kernel of our own; `how` asks for it, `picked` is what the call would take."""
        state = "no" if reason else "by name"
        if picked == "torch":
            return [("torch", "CHOSEN", f"auto keeps it until {ours} has been timed on a GPU"), (ours, state, reason or how)]
        return [("torch", "runs", f"not asked for: {how}"), (ours, "no" if reason else "CHOSEN", reason or how)]

    made = {"device": device, "dtype": dtype}
    hidden = torch.empty(1, shape.width, **made)
    loss = rows("triton", triton_sliced_loss.supports(hidden, hidden), 'backend="triton"')
    gate_up = torch.empty(1, 2 * shape.expert_width, shape.width, **made)
    reason = dict(moe.why(hidden, gate_up, torch.empty(1, shape.width, shape.expert_width, **made)))["triton"]
    experts = rows("triton", None if reason == "runs" else reason, "WEFT_MOE=triton", moe.CHOICE.pick())
    q, k = (torch.empty(1, n, shape.head_width, **made) for n in (shape.heads, shape.kv_heads))
    norm = rows("cuda", cuda.supports(q, k), "WEFT_QK_NORM=cuda", norm_rope.CHOICE.pick())
    keys: Any = SimpleNamespace(pool=k)  # a cache in the call's type
    decode = rows("cuda", cuda_decode.supports(q, k, keys), "WEFT_CACHE=paged WEFT_DECODE=cuda", cuda_decode.CHOICE.pick())
    routed = f"D={shape.width} E={shape.experts} S={shape.experts_per_token} F={shape.expert_width}"
    return [
        (f"sliced loss: D={shape.width}", loss),
        (f"routed experts: {routed}", experts),
        (f"QK-norm + rotation: H={shape.heads}/{shape.kv_heads} K={shape.head_width}", norm),
        (f"decoding: H={shape.heads}/{shape.kv_heads} K={shape.head_width}", decode),
    ]


def table(name: str, rows: list[Row]) -> Any:
    """Rows under their name; the chosen one stands out."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(show_header=False, title=name, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        made.add_row(*map(escape, row), style="bold" if row[1] == "CHOSEN" else None)
    return made


def backends_table() -> Any:
    """The attention backends for a common training call on this machine."""
    import torch

    shape = Shape(1024, 16, 4, 64, 256, 64, "auto", True, False, 1024, 64, 6, 512)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return table(f"attention on {device} (weft kernels says more)", attention_rows(shape, device, dtype))


def machine_rows() -> list[tuple[str, str]]:
    """Versions, tools and architectures behind the kernels."""
    import importlib.metadata

    import torch

    from weft.kernels import cuda_library as cuda

    rows = []
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", str(torch.version.cuda or "none: this torch was built without CUDA")))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        rows.append(("GPU", f"{torch.cuda.get_device_name()}, sm_{major}{minor}"))
    else:
        rows.append(("GPU", "none"))
    path = cuda.library_path()
    arches = ", ".join(f"sm_{arch}" for arch in cuda.ARCHITECTURES)
    rows.append(("CUDA toolkit", str(cuda.toolkit() or "not found (set CUDA_HOME)")))
    rows.append(("CUDA C++ kernels", f"{'built' if path.exists() else 'not built'} for {arches}: {path}"))
    rows.append(("Triton kernels", "compiled at first use, for compute capability 8.0 and later"))
    return rows


def show(
    length: int = 4096, heads: int = 16, kv_heads: int = 4, head_width: int = 64, window: int | None = 1024,
    landmark_every: int = 256, dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
    backward: bool = True, lse: bool = False, width: int = 1024, experts: int = 64, experts_per_token: int = 6,
    expert_width: int = 512,
) -> None:  # fmt: skip
    """What runs here for a shape, what `auto` chooses and why.

    `weft kernels build` compiles the CUDA kernels, `weft kernels bench` times all of them on a GPU.

    Args:
        length: tokens of the packed stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_width: channels per head.
        window: keys that a query sees; null for all.
        landmark_every: every so many tokens one that stays visible beyond the window; 0 for none.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        backward: whether gradients are wanted.
        lse: whether the log-sum-exp is wanted.
        width: channels of the model.
        experts: routed experts of a layer.
        experts_per_token: experts that a token takes.
        expert_width: hidden channels of one expert.
    """
    import torch
    from rich.console import Console

    from weft.kernels.attention import ORDER

    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads; found {heads} and {kv_heads}")
    if min(length, head_width, width, experts, experts_per_token, expert_width) < 1 or landmark_every < 0:
        raise ValueError("sizes must be at least 1 (landmark_every: 0 for none)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if device == "cuda" else torch.float32
    shape = Shape(
        length, heads, kv_heads, head_width, window, landmark_every, dtype, backward, lse, width, experts, experts_per_token,
        expert_width,
    )  # fmt: skip
    console = Console()
    way = "forward and backward" if backward else "forward"
    marks = f"a landmark every {landmark_every}" if landmark_every else "no landmarks"
    seen = f"window {window}, {marks}" if window else "no window"
    title = f"attention: T={length} H={heads}/{kv_heads} K={head_width}, {seen}, {way}{', log-sum-exp' if lse else ''}"
    console.print(f"kernels on {device} in {str(kind).removeprefix('torch.')}")
    if device == "cpu":
        console.print(f"for attention on a GPU auto asks {', '.join(ORDER['cuda'])}: the first that supports the call")
    console.print()
    sections = [(title, attention_rows(shape, device, kind)), *other_rows(shape, device, kind)]
    for name, rows in sections:
        console.print(table(name, rows), "")
    console.print(table("versions and tools", [(name, state, "") for name, state in machine_rows()]))


def build(target: Path | None = None) -> None:
    """Compile the CUDA C++ kernels with nvcc.

    Args:
        target: the shared object to write; by default beside the sources or, if that is read-only, in the user's cache.
    """
    from weft.kernels import cuda

    cuda.build(target)
    print(f"built {target or cuda.library_path()}")


def bench(out: Path = Path("kernels-bench"), quick: bool = False, only: str = "", dry_run: bool = False) -> None:
    """Time the GPU kernels against the libraries: bench.txt, bench.json and bench.png in `out`. Needs an NVIDIA GPU.

    Args:
        out: folder for the files.
        quick: one length, window and head width.
        only: some of attention,loss,moe,norm,decode,step, separated by commas.
        dry_run: tiny shapes on a CPU, to see that everything works; its figures say nothing about a GPU.
    """
    from weft.benchmarks.speed import gpu

    files = ["--json", str(out / "bench.json"), "--plot", str(out / "bench.png"), "--text", str(out / "bench.txt")]
    flags = [*(["--quick"] if quick else []), *(["--smoke"] if dry_run else []), *(["--only", only] if only else [])]
    status = gpu.main([*files, *flags])
    if status:
        raise SystemExit(status)


WORDS: dict[str, Callable[..., None]] = {"list": show, "build": build, "bench": bench}


def kernels(argv: list[str]) -> None:
    """`weft kernels [list|build|bench] [options]`."""
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    word, rest = (argv[0], argv[1:]) if argv and argv[0] in WORDS else ("list", argv)
    auto_cli(WORDS[word], args=rest, prog=f"weft kernels {word}", as_positional=True)


kernels.raw = True  # type: ignore[attr-defined]
