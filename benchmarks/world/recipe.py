"""How the sample world is trained: shares of the data, the shape of the model, the optimizer. Data, tuned by measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from weft.benchmarks.world.documents import mixture
from weft.kernels.hardware import multiplies_bfloat16
from weft.tokenizers.bundle import StreamTokenizer
from weft.training.config import CheckpointSection, DataSection, ModelSection, RunConfig, TrackingSection
from weft.training.data.config import SourceConfig
from weft.training.engine import EngineConfig
from weft.training.loss import LossConfig
from weft.training.optim import OptimizerConfig
from weft.training.schedule import ScheduleConfig

SIZES: dict[str, Any] = {
    "width": 128,
    "layers": 4,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 64,
    "experts": 4,
    "experts_per_token": 1,
    "expert_width": 128,
    "shared_width": 128,
    "dense_width": 256,
    "window": 256,
    "full_every": 4,
}
"""Narrow, with Muon: after 360 s on one AVX2 core (held-out documents), digit strings were right in 48 % with width 256 and
AdamW, 64 % with 192, 70 % with 128; with Muon in 34 % (256), 82 % (192) and 94 % (128), sums in 8, 58 and 84 %. Muon learns
more from a token, and its cost falls with the third power of the width."""
BATCH_TOKENS = 2048
LR = 2e-3
SHORT: dict[str, Any] = {
    "max_steps": 340,
    "batch_tokens": 1536,
    "lr": 3e-3,
    "sizes": {"layers": 3, "experts": 2},
    "shares": {
        "video": 36,
        "motor_fault": 12,
        "half": 7,
        "arithmetic": 5,
        "digits_speech": 4,
        "pendulum": 4,
        "cartpole": 2.5,
        "prose": 2,
    },
}
"""What a minute of training needs to leave chance behind everywhere: smaller steps, a larger rate, a smaller model, and more of
what is learnt last. Right on held-out documents of 0.2 of the world: 5 % of videos and 9 % of sums after 280 steps of a whole
run's recipe, 19 and 27 % after these 340."""


def sources(world: Path) -> list[str]:
    """Sources with training documents, in the order of the world's card."""
    known = json.loads((world / "world.json").read_text(encoding="utf-8"))["sources"]
    return [name for name, about in known.items() if about["documents"]["train"]]


def ranks(device: str) -> int:
    """Training processes: one on a GPU, else one per core, at most 8."""
    import os

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return 1
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def run_config(
    root: Path,
    tokenizer: StreamTokenizer,
    *,
    seed: int = 0,
    sizes: dict[str, Any] | None = None,
    shares: dict[str, float] | None = None,
    lr: float = LR,
) -> RunConfig:
    """The quickstart's run in `root`. `shares`: percent of the training tokens of single sources, instead of the world's."""
    weights = mixture(shares)
    data = tuple(
        SourceConfig(path=str(root / "shards" / name), name=name, weight=weights[name]) for name in sources(root / "world")
    )
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return RunConfig(
        folder=root / "run",
        seed=seed,
        max_seconds=630,
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
        optimizer=OptimizerConfig(kind="muon", lr=lr, weight_decay=0.05),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=100, decay_share=0.6, floor=0.02),
        engine=EngineConfig(kind="local", precision="bf16" if multiplies_bfloat16(place) else "fp32"),
        checkpoint=CheckpointSection(every=1000, keep_last=2),
        tracking=TrackingSection(trackers=(), panel="none"),
    )
