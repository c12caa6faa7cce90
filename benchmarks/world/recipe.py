"""How the sample world is trained: shares of the data, the shape of the model, the optimizer. Data, tuned by measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft.tokenizers.bundle import StreamTokenizer
from weft.training.config import CheckpointSection, DataSection, ModelSection, RunConfig, TrackingSection
from weft.training.data.config import SourceConfig
from weft.training.engine import EngineConfig
from weft.training.loss import LossConfig
from weft.training.optim import OptimizerConfig
from weft.training.schedule import ScheduleConfig

SIZES: dict[str, Any] = {
    "width": 256,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 64,
    "experts": 4,
    "experts_per_token": 1,
    "expert_width": 256,
    "shared_width": 256,
    "dense_width": 512,
    "window": 256,
    "full_every": 4,
}
BATCH_TOKENS = 4096


def sources(world: Path) -> list[str]:
    """Sources with training documents, in the order of the world's card."""
    known = json.loads((world / "world.json").read_text(encoding="utf-8"))["sources"]
    return [name for name, about in known.items() if about["documents"]["train"]]


def fast_bf16() -> bool:
    """Whether bfloat16 matmuls run in hardware here: a GPU, or a CPU with AVX-512 BF16 or AMX. Elsewhere they are emulated."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, flag, bool)() for flag in flags)


def ranks(device: str) -> int:
    """Training processes: one on a GPU, else one per core, at most 8."""
    import os

    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return 1
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def run_config(root: Path, tokenizer: StreamTokenizer, *, seed: int = 0, sizes: dict[str, Any] | None = None) -> RunConfig:
    """The quickstart's run in `root`."""
    known = json.loads((root / "world" / "world.json").read_text(encoding="utf-8"))["sources"]
    data = tuple(
        SourceConfig(path=str(root / "shards" / name), name=name, weight=known[name]["weight"])
        for name in sources(root / "world")
    )
    return RunConfig(
        folder=root / "run",
        seed=seed,
        max_seconds=660,
        model=ModelSection(preset="tiny", sizes={**SIZES, **(sizes or {})}),
        data=DataSection(
            sources=data,
            tokenizer=root / "tokenizer",
            plan="instruct",
            batch_tokens=BATCH_TOKENS,
            length=512,
            streams_folder=str(root / "streams"),
        ),
        loss=LossConfig(mean_over="tokens", contrastive=0.3),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=50, decay_share=0.6, floor=0.02),
        engine=EngineConfig(kind="local", precision="bf16" if fast_bf16() else "fp32"),
        checkpoint=CheckpointSection(every=250, keep_last=2),
        tracking=TrackingSection(trackers=(), panel="none"),
    )
