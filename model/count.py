"""Parameters, arithmetic and memory, answered from a config without building a model.

In: a `ModelConfig`. Out: `param_shapes` (every tensor of the state dict), counts of parameters, FLOPs per token by part, and
bytes by part. Tests hold each against the built model. One multiply-add is two FLOPs; norms and softmax are not counted.

Axes: `D width  H heads  G kv heads  K head width  E experts  S experts per token  F expert width  V vocab`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weft.model.config import ModelConfig, Resample

Shapes = dict[str, tuple[int, ...]]


def param_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of `Transformer(config)`, in its order."""
    width = config.width
    shapes: Shapes = {
        "embedding.tokens.weight": (config.vocab_size, width),
        "embedding.modality.weight": (config.num_modalities, width),
        "embedding.channel.weight": (config.num_channels, width),
    }
    for name, size in config.feature_sizes.items():
        shapes.update(_encoder(f"embedding.features.{name}", size, config, config.resample.get(name)))
    for layer in range(config.layers):
        shapes.update({f"blocks.{layer}.{name}": shape for name, shape in _block(config, layer).items()})
    shapes["norm.weight"] = (width,)
    if not config.tied:
        shapes["output.weight"] = (config.vocab_size, width)
    shapes["embed_head.log_scale"] = ()
    shapes["embed_head.proj.weight"] = (config.embed_width, width)
    return shapes


def buffer_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every buffer: the routers' selection biases."""
    layers = range(config.layers)
    return {f"blocks.{layer}.mlp.bias": (config.experts,) for layer in layers if config.is_routed(layer)}


def num_params(config: ModelConfig) -> int:
    """Parameters, all experts included."""
    return sum(math.prod(shape) for shape in param_shapes(config).values())


def active_params(config: ModelConfig) -> int:
    """Parameters that one token passes through: S of E experts, the rest whole (embedding rows included)."""
    idle = 1 - config.experts_per_token / max(config.experts, 1)
    shapes = param_shapes(config).items()
    return num_params(config) - sum(int(math.prod(shape) * idle) for name, shape in shapes if ".mlp.experts." in name)


def _encoder(prefix: str, size: int, config: ModelConfig, resample: Resample | None) -> Shapes:
    width, hidden = config.width, config.feature_hidden
    size //= resample.rows if resample else 1
    if hidden is None:
        shapes: Shapes = {"proj.weight": (width, size), "proj.bias": (width,)}
    else:
        shapes = {"proj.0.weight": (hidden, size), "proj.0.bias": (hidden,)}
        shapes.update({"proj.2.weight": (width, hidden), "proj.2.bias": (width,)})
    if resample is not None:
        shapes.update({f"resampler.{name}": shape for name, shape in _resampler(config, resample).items()})
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _resampler(config: ModelConfig, resample: Resample) -> Shapes:
    width = config.width
    inner = max(1, width // config.head_width) * config.head_width
    shapes: Shapes = {"latents": (resample.latents, width), "time": (resample.tokens, width)}
    for layer in range(resample.depth):
        one: Shapes = {
            "feature_norm.weight": (width,),
            "latent_norm.weight": (width,),
            "query.weight": (inner, width),
            "key_value.weight": (2 * inner, width),
            "out.weight": (width, inner),
            "ffn_norm.weight": (width,),
            "up.weight": (4 * width, width),
            "down.weight": (width, 4 * width),
        }
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in one.items()})
    shapes["norm.weight"] = (width,)
    return shapes


def _block(config: ModelConfig, layer: int) -> Shapes:
    width, head = config.width, config.head_width
    inner = config.heads * head
    shapes: Shapes = {
        "attention_norm.weight": (width,),
        "attention.q_norm": (head,),
        "attention.k_norm": (head,),
        "attention.qkv.weight": (inner + 2 * config.kv_heads * head, width),
        "attention.out.weight": (width, inner),
        "ffn_norm.weight": (width,),
    }
    hidden = config.ffn_width(layer)
    if hidden:
        shapes.update({"ffn.gate_up.weight": (2 * hidden, width), "ffn.down.weight": (width, hidden)})
    if config.is_routed(layer):
        shapes["mlp.gate.weight"] = (config.experts, width)
        shapes["mlp.experts.gate_up_proj"] = (config.experts, 2 * config.expert_width, width)
        shapes["mlp.experts.down_proj"] = (config.experts, width, config.expert_width)
    return shapes


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token by part; a backward pass costs twice the forward."""

    attention_linear: float
    attention_scores: float
    ffn: float
    experts: float
    router: float
    output: float

    @property
    def forward(self) -> float:
        """All parts."""
        parts = (self.attention_linear, self.attention_scores, self.ffn, self.experts, self.router, self.output)
        return float(sum(parts))

    @property
    def backward(self) -> float:
        """Two products for each of the forward: one for the inputs' gradient, one for the weights'."""
        return 2 * self.forward

    @property
    def train(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def flops_per_token(config: ModelConfig, context: float = 1024, slice_size: float | None = None) -> Flops:
    """FLOPs of one token that sees `context` tokens of its document (on average; local layers at most the window) and reads
    an output slice of `slice_size` ids (None: the mean slice, each counted by its size)."""
    linear = ffn = experts = router = scores = 0.0
    for layer in range(config.layers):
        shapes = _block(config, layer)
        linear += 2 * (math.prod(shapes["attention.qkv.weight"]) + math.prod(shapes["attention.out.weight"]))
        seen = context if config.is_full(layer) or config.window is None else min(context, config.window)
        scores += 4 * seen * config.heads * config.head_width
        ffn += 2 * 3 * config.ffn_width(layer) * config.width
        if config.is_routed(layer):
            router += 2 * config.experts * config.width
            experts += 2 * 3 * config.expert_width * config.width * config.experts_per_token
    if slice_size is None:
        sizes = [end - first for first, end in config.slices]
        slice_size = sum(size * size for size in sizes) / sum(sizes)
    return Flops(linear, scores, ffn, experts, router, 2 * slice_size * config.width)


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts, on one device without sharding."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(config: ModelConfig, tokens: int, bytes_per_value: int = 4, master: bool = False, recompute: bool = False) -> Memory:
    """Bytes for a step over `tokens` packed tokens. `bytes_per_value`: 4 for float32, 2 for bfloat16 weights and activations;
    `master`: Adam keeps float32 master weights beside its two float32 moments; `recompute`: blocks keep only their input."""
    params = num_params(config)
    kept = sum(_saved(config, layer) for layer in range(config.layers))
    if recompute:
        kept = config.layers * config.width + max(_saved(config, layer) for layer in range(config.layers))
    kept += 2 * config.width  # the final norm's input and output
    optimizer = params * (8 + (4 if master else 0))
    return Memory(params * bytes_per_value, params * bytes_per_value, optimizer, int(tokens * kept * bytes_per_value))


def _saved(config: ModelConfig, layer: int) -> int:
    """Values per token that a block keeps for its backward pass, after the custom functions of `kernels/`."""
    width, inner, head = config.width, config.heads * config.head_width, config.head_width
    qkv = inner + 2 * config.kv_heads * head
    attention = 2 * width + qkv + inner + config.kv_heads * head + inner  # norm in and out, qkv, turned q and k, mixed
    ffn = 2 * width + 3 * config.ffn_width(layer)  # norm in and out, gate, up, product
    if not config.is_routed(layer):
        return attention + ffn
    return attention + ffn + config.experts_per_token * (2 * width + 3 * config.expert_width) + 2 * config.experts


def cache_bytes(config: ModelConfig, tokens: int, landmarks: int = 0, bytes_per_value: int = 4) -> int:
    """Bytes of the live slots of a document's cache after `tokens` tokens, `landmarks` of them landmarks beyond the window."""
    per_slot = 2 * config.kv_heads * config.head_width * bytes_per_value
    full = sum(config.is_full(layer) for layer in range(config.layers))
    if config.window is None or tokens <= config.window:
        return config.layers * tokens * per_slot
    kept = landmarks if config.max_landmarks is None else min(landmarks, config.max_landmarks)
    return (full * tokens + (config.layers - full) * (config.window + kept)) * per_slot
