"""Named sizes with the reasons of their shapes.

Rules behind all of them: head width 64 (128 from `large`, where attention kernels are fastest); key heads a quarter of the
query heads, because a stream's cache is what an endless session pays for; every fourth layer full (Gemma 3 and Command A
use 5:1 and 3:1 with no loss; arXiv 2503.19786, 2504.00698); feed-forward widths a multiple of 64, so that every row of every
expert stays aligned for grouped matmuls; one shared expert as wide as one routed expert (DeepSeekMoE, arXiv 2401.06066).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from weft.model.config import ConfigError, ModelConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores: few layers, because a narrow layer's overhead is not its arithmetic; top-1 of 4 small experts
    # keeps 16-row tiles full; the window of 256 covers a quickstart document whole, so one layout serves both layer kinds.
    "tiny": {
        "width": 192,
        "layers": 4,
        "heads": 3,
        "kv_heads": 1,
        "head_width": 64,
        "experts": 4,
        "experts_per_token": 1,
        "expert_width": 192,
        "shared_width": 192,
        "dense_width": 512,
        "window": 256,
        "embed_width": 128,
    },
    # Hours on one consumer GPU: 8 experts are the fewest with which top-2 still skips most weights.
    "small": {
        "width": 512,
        "layers": 8,
        "heads": 8,
        "kv_heads": 2,
        "head_width": 64,
        "experts": 8,
        "experts_per_token": 2,
        "expert_width": 512,
        "shared_width": 512,
        "dense_width": 1536,
        "window": 512,
        "embed_width": 256,
        "max_landmarks": 1024,
    },
    # Days on one node of 8 GPUs: 64 fine-grained experts, 6 active, as DeepSeekMoE 16B found best at equal arithmetic.
    "base": {
        "width": 1024,
        "layers": 16,
        "heads": 16,
        "kv_heads": 4,
        "head_width": 64,
        "experts": 64,
        "experts_per_token": 6,
        "expert_width": 512,
        "shared_width": 1024,
        "dense_width": 4096,
        "window": 1024,
        "embed_width": 512,
        "max_landmarks": 1024,
        "rope_theta": 100_000.0,
    },
    # Tens of nodes: the shape of Qwen3-30B-A3B made shallower; 8 of 128 experts active, one per GPU under 128-way sharding.
    "large": {
        "width": 2048,
        "layers": 28,
        "heads": 16,
        "kv_heads": 4,
        "head_width": 128,
        "experts": 128,
        "experts_per_token": 8,
        "expert_width": 768,
        "shared_width": 1536,
        "dense_width": 6144,
        "window": 1024,
        "embed_width": 1024,
        "max_landmarks": 2048,
        "rope_theta": 1_000_000.0,
    },
    # A full cluster: about 230 G weights with about 14 G active, near Qwen3-235B-A22B and GLM-4.5-Air in sparsity.
    "xl": {
        "width": 4096,
        "layers": 48,
        "heads": 32,
        "kv_heads": 4,
        "head_width": 128,
        "experts": 256,
        "experts_per_token": 8,
        "expert_width": 1536,
        "shared_width": 1536,
        "dense_width": 12288,
        "window": 2048,
        "embed_width": 1024,
        "max_landmarks": 4096,
        "rope_theta": 1_000_000.0,
    },
}


def preset(name: str, **sizes: Any) -> ModelConfig:
    """The named preset with `sizes` (at least `vocab_size`) set or replaced. Raises `ConfigError` for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}; known are {', '.join(PRESETS)}")
    return ModelConfig.from_dict({**PRESETS[name], **sizes})


def scaled(config: ModelConfig, factor: int) -> ModelConfig:
    """`config` with every width times `factor` and the same depth: what learning rates transfer across (`init.py`)."""
    names = ("width", "heads", "kv_heads", "expert_width", "shared_width", "dense_width", "embed_width")
    return dataclasses.replace(config, **{name: getattr(config, name) * factor for name in names})
