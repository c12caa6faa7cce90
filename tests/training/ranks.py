"""A scenario on ranks joined by gloo, forked from this process: one group, many scenarios, and no imports to wait for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weft.benchmarks.speed.ranks import on_ranks
from weft.training.deepspeed_engine import import_deepspeed


def launch(scenario: Callable[[Path], dict[str, Any]], out: Path, ranks: int = 2, limit_s: float = 900.0) -> dict[str, Any]:
    """What the scenario returned on rank 0; it writes tensors into `out`. A rank that fails ends the test with its output."""
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_deepspeed(torch.device("cpu"))
    found: dict[str, Any] = on_ranks(lambda: scenario(out), ranks, limit_s)[0]
    return found
