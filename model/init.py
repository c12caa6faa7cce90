"""Initial weights and learning rates that transfer across widths: muP for Adam, in its plain form.

Maximal update parametrisation (arXiv 2203.03466, table 8) says how each kind of matrix must scale with the width D so that
one Adam step changes every activation by the same amount at any width:

    kind                                   initial std            learning rate
    input (ids, features, modality, ...)   constant / sqrt(F in)  constant           F in does not grow with D
    vectors (norm gains, biases)           1 or 0                 constant
    hidden matrices                        1 / sqrt(fan in)       base_width / D
    output (V D), router gate, embed head  sqrt(base_width) / D   base_width / D     their sums over D must not grow

Attention logits need no 1/K rule: queries and keys are normalised, and K does not grow with D. The two matrices that write to
the residual stream are divided by sqrt(2 * layers), so that its variance does not grow with depth (GPT-2). All hidden widths
are meant to scale together (`presets.scaled`), thus one factor serves them all. The weight decay of the scaled groups is
multiplied by D / base_width, because AdamW multiplies it with the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["input", "vector", "hidden", "output"]
EMBEDDING_STD = 0.3
"""Of token embeddings. Not measured beyond the tiny scale; norms before every layer make it a relative learning rate."""
LOGIT_STD = 0.5
"""Of logits at initialisation: small against log V, large enough that gradients reach the trunk at once."""


def kind_of(name: str, param: Tensor) -> Kind:
    """What the table above calls a parameter, from its name in `Transformer.named_parameters()`."""
    if name == "output.weight" or name.endswith("mlp.gate.weight") or name == "embed_head.proj.weight":
        return "output"
    if param.dim() < 2:
        return "vector"
    hidden_encoder = name.startswith("embedding.features.") and ".resampler.layers." in name
    return "input" if name.startswith("embedding.") and not hidden_encoder else "hidden"


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw every parameter of a `Transformer` anew, in the order of `named_parameters`."""
    config: Any = model.config
    for name, param in model.named_parameters():
        if name == "embed_head.log_scale" or name.endswith("resampler.time"):
            continue
        if kind_of(name, param) == "vector":
            param.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            param.normal_(0.0, _std(name, param, config), generator=generator)
    if config.tied:  # the embedding's rows are not as small as an output's: the final gain makes up for it
        model.get_parameter("norm.weight").fill_(LOGIT_STD / (EMBEDDING_STD * math.sqrt(config.width)))


def _std(name: str, param: Tensor, config: Any) -> float:
    kind = kind_of(name, param)
    if kind == "output":
        scale = math.sqrt(min(config.base_width, config.width)) / config.width
        return scale * (LOGIT_STD if name == "output.weight" else 1.0)
    if name.endswith("resampler.latents"):
        return 1.0
    if name.startswith("embedding.features.") and kind == "input":
        return (EMBEDDING_STD if name.endswith(("proj.weight", "proj.2.weight")) else 1.0) / math.sqrt(param.shape[-1])
    if kind == "input":
        return EMBEDDING_STD
    writes = name.endswith(("attention.out.weight", "ffn.down.weight", "experts.down_proj"))
    return 1 / math.sqrt(param.shape[-1]) / (math.sqrt(2 * config.layers) if writes else 1.0)


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Optimizer groups for `torch.optim.AdamW` (or DeepSpeed): `params`, `lr`, `weight_decay`, and `lr_scale` and `name` for
    schedules and reports. Norm gains, biases and embeddings are not decayed."""
    config: Any = model.config
    scale = config.base_width / config.width
    settings = {
        "input": (1.0, 0.0),
        "vector": (1.0, 0.0),
        "hidden": (scale, weight_decay / scale),
        "output": (scale, weight_decay / scale),
    }
    groups = []
    for kind, (lr_scale, decay) in settings.items():
        params = [p for _, p in _of_kind(model, kind)]
        if params:
            groups.append({"params": params, "lr": lr * lr_scale, "lr_scale": lr_scale, "weight_decay": decay, "name": kind})
    return groups


def _of_kind(model: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if kind_of(name, p) == kind)
