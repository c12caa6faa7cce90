"""`weft kernels`: which attention backends run here, and what `auto` would choose."""

from __future__ import annotations

from typing import Any, Literal


def backends_table(length: int = 256, heads: int = 4, kv_heads: int = 2, head_width: int = 64) -> Any:
    """A table of every backend and why it cannot serve the given shape on this machine."""
    import torch
    from rich.table import Table

    from weft.kernels.attention import why
    from weft.kernels.layout import StreamLayout

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    document = torch.zeros(length, dtype=torch.int32, device=device)
    none = torch.zeros(length, dtype=torch.bool, device=device)
    layout = StreamLayout.build(document, none, torch.full_like(document, -1), window=64)
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


def kernels(length: int = 256, heads: int = 4, kv_heads: int = 2, head_width: int = 64, show: Literal["list"] = "list") -> None:
    """List attention backends.

    Args:
        length: tokens of the packed stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_width: channels per head.
        show: what to print.
    """
    from rich.console import Console

    Console().print(backends_table(length, heads, kv_heads, head_width))
