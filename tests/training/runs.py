"""Short runs for tests: config, data and a fingerprint of everything that must be exact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.training.synthetic import mixed_streams, small_model
from weft.training.batches import Batches, StreamBatches
from weft.training.config import RunConfig
from weft.training.parts import RunResult
from weft.training.strict import build
from weft.training.train import train

QUIET = {"trackers": [], "panel": "none", "plots": False}


def config(folder: Path, **given: Any) -> RunConfig:
    """A run of 12 small steps with a checkpoint every 3."""
    base: dict[str, Any] = {
        "folder": str(folder),
        "max_steps": 12,
        "data": {"batch_tokens": 128, "micro_batches": 2, "prefetch": 0},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 3},
        "tracking": QUIET,
        "monitors": {"router_every": 4, "probe_every": 5, "window": 8},
    }
    for name, value in given.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) and name in base else value
    return build(RunConfig, base)


def data(run: RunConfig) -> Batches:
    """Streams of all modalities in memory."""
    d = run.data
    return StreamBatches(mixed_streams(24), d.batch_tokens, d.micro_batches, per_step=6, seed=run.seed, round_to=32)


def go(run: RunConfig, **given: Any) -> RunResult:
    """Train from the same weights every time."""
    given.setdefault("source", data(run))
    given.setdefault("model", small_model())
    return train(run, **given)


def sha(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(folder: Path, step: int = 12) -> dict[str, str]:
    """Everything of a finished run that the seed determines."""
    last = folder / "checkpoints" / f"step-{step:08d}"
    found = {name: sha(last / name) for name in ("model.safetensors", "optimizer.safetensors", "config.json")}
    found["final"] = sha(folder / "final" / "model.safetensors")
    found["metrics"] = sha(folder / "metrics.jsonl")
    ema = last / "ema.safetensors"
    return found | ({"ema": sha(ema)} if ema.exists() else {})
