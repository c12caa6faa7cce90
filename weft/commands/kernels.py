"""`weft kernels`: which kernels run here and what `auto` would choose; `weft kernels build` and `weft kernels bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def backends_table(length: int = 256, heads: int = 4, kv_heads: int = 2, head_width: int = 64, window: int | None = 64) -> Any:
    """A table of every backend and why it cannot serve the given shape on this machine."""
    import torch
    from rich.table import Table

    from weft.kernels.attention import why
    from weft.kernels.layout import StreamLayout

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    document = torch.zeros(length, dtype=torch.int32, device=device)
    none = torch.zeros(length, dtype=torch.bool, device=device)
    layout = StreamLayout.build(document, none, torch.full_like(document, -1), window=window)
    q = torch.randn(length, heads, head_width, device=device, dtype=dtype)
    k = torch.randn(length, kv_heads, head_width, device=device, dtype=dtype)
    table = Table("attention backend", "here", title=f"kernels on {device}, {dtype}", title_justify="left")
    chosen = False
    for name, reason in why(q, k, k, layout):
        runs = reason == "runs"
        state = reason if chosen or not runs else "runs, chosen by auto"
        chosen = chosen or runs
        table.add_row(name, state.replace("[", r"\["))
    return table


def others_table() -> Any:
    """The other GPU kernels, and the versions and tools behind all of them."""
    import importlib.metadata

    import torch
    from rich.table import Table

    from weft.kernels import cuda, triton_sliced_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.zeros(1, 1, 64, device=device)
    table = Table("kernel or tool", "here", title="other kernels and tools", title_justify="left")
    weight = torch.ones(64, device=device)
    table.add_row("sliced loss (triton)", triton_sliced_loss.supports(probe[0], probe[0]) or "runs, chosen by auto")
    table.add_row("QK-norm + rotation (CUDA C++)", cuda.supports(probe, probe, weight, weight) or "runs when called by name")
    for name in ("torch", "triton", "xformers"):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else None
    table.add_row("GPU", f"{torch.cuda.get_device_name()}, compute capability {capability}" if capability else "none")
    table.add_row("CUDA toolkit", str(cuda.toolkit() or "not found"))
    table.add_row("CUDA C++ kernels", f"{cuda.library_path()} ({'built' if cuda.library_path().exists() else 'not built'})")
    return table


def show(length: int = 256, heads: int = 4, kv_heads: int = 2, head_width: int = 64, window: int | None = 64) -> None:
    """List kernels and what `auto` chooses. `weft kernels build` compiles the CUDA ones, `weft kernels bench` times all.

    Args:
        length: tokens of the packed stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_width: channels per head.
        window: keys that a query sees; null for all.
    """
    from rich.console import Console

    console = Console()
    console.print(backends_table(length, heads, kv_heads, head_width, window))
    console.print(others_table())


def build(target: Path | None = None) -> None:
    """Compile the CUDA C++ kernels with nvcc.

    Args:
        target: the shared object to write; by default beside the sources or, if that is read-only, in the user's cache.
    """
    from weft.kernels import cuda

    cuda.build(target)
    print(f"built {target or cuda.library_path()}")


def bench(out: Path = Path("kernels-bench"), quick: bool = False) -> None:
    """Time the GPU kernels against the libraries: a table, and in `out` bench.json and bench.png. Needs an NVIDIA GPU.

    Args:
        out: folder for the files.
        quick: one window and one head width.
    """
    from weft.benchmarks.speed import gpu

    gpu.main(["--json", str(out / "bench.json"), "--plot", str(out / "bench.png"), *(["--quick"] if quick else [])])


WORDS: dict[str, Callable[..., None]] = {"list": show, "build": build, "bench": bench}


def kernels(argv: list[str]) -> None:
    """`weft kernels [list|build|bench] [options]`."""
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    word, rest = (argv[0], argv[1:]) if argv and argv[0] in WORDS else ("list", argv)
    auto_cli(WORDS[word], args=rest, prog=f"weft kernels {word}", as_positional=True)


kernels.raw = True  # type: ignore[attr-defined]
